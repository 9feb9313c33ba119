//! `cargo bench`: naive against fast layers on CS231n's shapes, fast ones on the shapes of networks, whole training steps.
//!
//! Every result is compared with its naive twin before anything is timed; a difference ends the run. `cargo bench -- conv`
//! runs what has `conv` in its name. Where the work is in FLOP, criterion's Gelem/s are GFLOP/s.

mod activation;
mod batchnorm;
mod common;
mod conv;
mod gemm;
mod pool;
mod train_step;

use criterion::Criterion;
use gemmnet::{blas, parallel};

/// Everything runs as in the library: inside one pool, of `GEMMNET_NUM_THREADS` threads or one per core.
fn main() {
    // SAFETY: the program has one thread, this one, and has done nothing yet.
    unsafe { blas::choose_kernels() };
    let threads = parallel::thread_count(None).expect("GEMMNET_NUM_THREADS, if set, is a number of threads");
    println!("{threads} thread(s); {:?}", blas::setup());
    let benches = || {
        let mut criterion = Criterion::default().nresamples(10_000).configure_from_args();
        for run in [conv::run, pool::run, batchnorm::run, activation::run, gemm::run, train_step::run] {
            run(&mut criterion);
        }
        criterion.final_summary();
    };
    parallel::with_threads(threads, benches).expect("the system has threads to give");
}
