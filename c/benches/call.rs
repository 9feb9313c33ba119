//! What the border to C costs: a session called from Rust, and the same through the C functions, in one process and on one
//! thread. The network is as small as one can be, lest it hides the difference.

#[path = "../src/lib.rs"]
#[expect(unreachable_pub, reason = "no Rust program can link the library, so its code is compiled in")]
mod c;

use std::ptr;

use c::{Code, gemmnet_model_load, gemmnet_run, gemmnet_scratch_new, gemmnet_session_new};
use criterion::{Criterion, criterion_group, criterion_main};
use gemmnet::parallel::Threads;
use gemmnet::prelude::*;

fn calls(criterion: &mut Criterion) {
    let network = Network::<f32>::new(&"affine2".parse().expect("notation"), [1, 2, 2], Init::He, 0).expect("small");
    let (x, mut scores) = ([0.5; 4], [0.0; 2]);
    let (session, threads) = (Session::new(&network, 1).expect("one image"), Threads::new(1).expect("one thread"));
    let mut scratch = threads.run(|| session.scratch());
    criterion.bench_function("from Rust", |bencher| {
        bencher.iter(|| threads.run(|| session.run(&x, &mut scores, &mut scratch)).expect("the lengths fit"));
    });

    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    network.save(file.path()).expect("it can be written");
    let path = std::ffi::CString::new(file.path().to_str().expect("UTF-8")).expect("no zero");
    let (mut model, mut session, mut scratch) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: a path that ends with a zero, and the addresses of pointers.
    let made = unsafe {
        [
            gemmnet_model_load(path.as_ptr(), &mut model),
            gemmnet_session_new(model, 1, &mut session),
            gemmnet_scratch_new(session, 1, &mut scratch),
        ]
    };
    assert_eq!(made, [Code::GemmnetOk; 3]);
    criterion.bench_function("from C", |bencher| {
        bencher.iter(|| {
            // SAFETY: pointers that were made above, and buffers of these lengths.
            let code = unsafe { gemmnet_run(session, scratch, x.as_ptr(), x.len(), scores.as_mut_ptr(), scores.len()) };
            assert_eq!(code, Code::GemmnetOk);
        });
    });
}

criterion_group!(benches, calls);
criterion_main!(benches);
