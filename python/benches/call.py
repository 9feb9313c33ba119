#!/usr/bin/env python3
"""What a call from Python costs: a session of a network as small as one can be, lest it hides the difference.

    python python/benches/call.py

Needs the package built with optimisation: pip install ./python, or maturin develop --release. The same call from Rust and
from C: cargo bench -p gemmnet-c.
"""

import statistics
import timeit

import numpy as np

import gemmnet

ROUNDS, CALLS = 201, 1000

images = np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2)
model = gemmnet.train("affine2", images, [0, 1, 0, 1], images, [0, 1, 0, 1], epochs=1, progress=False).model
session = model.session(batch=1, threads=1)
x, out = np.full((1, 1, 2, 2), 0.5, np.float32), np.empty((1, 2), np.float32)

for name, call in [("run(x)", lambda: session.run(x)), ("run(x, out=out)", lambda: session.run(x, out=out))]:
    rounds = timeit.repeat(call, number=CALLS, repeat=ROUNDS)
    print(f"{name:16} {statistics.median(rounds) / CALLS * 1e6:.2f} us, median of {ROUNDS} rounds of {CALLS} calls")
