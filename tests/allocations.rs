//! After the first step, a training step allocates nothing: not in the network, the batch, or the optimizer. Nor does a
//! call of an inference session.
//!
//! One test in a file of its own, because the counter sees the whole process. With BLAS only: the pure-Rust product
//! (`matrixmultiply`) allocates the memory that it packs its operands into, at every call.
#![cfg(feature = "blas")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use gemmnet::data::{Augment, Dataset, Draw, Fill, Flip, Normalization, Split};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::nn::session::Session;
use gemmnet::optim::{Ema, Group, LearningRate, Optimizer, Progress};
use ndarray::Array4;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations so far, memory maps of buffers among them.
fn allocated() -> usize {
    ALLOCATIONS.load(Ordering::Relaxed) + gemmnet::workspace::maps()
}

/// Allocations of `steps` training steps after `first` ones.
fn allocations(notation: &str, data: &Dataset, clip: Option<f64>, first: u64, steps: u64) -> usize {
    let spec: NetworkSpec = notation.parse().unwrap();
    let mut network = Network::<f32>::new(&spec, data.dim(), Init::He, 0).unwrap();
    let rate = LearningRate::constant(1e-3).unwrap();
    let group = |select: &str, rule: &str| Group::new(select.parse().unwrap(), rule.parse().unwrap(), rate);
    let groups =
        vec![Group { l2: 1e-3, ..group("conv*.weight", "muon") }, group("*.bias", "momentum"), group("*", "adam")];
    let mut optimizer = Optimizer::new(groups, network.params()).unwrap();
    optimizer.set_clip_norm(clip).unwrap();
    let mut average = Ema::new(0.9, network.params()).unwrap();
    let indices: Vec<usize> = (0..48).collect();
    let (mut x, mut y) = (vec![0.0; indices.len() * data.image_len()], vec![0; indices.len()]);
    let augment = Some(Augment { flip: Flip::Alternating, shift: 2, fill: Fill::Reflect, cutout: 4 });
    let mut step = |step: u64| {
        let draw = Draw::augmented(Split::Train, augment, 0, step);
        data.fill_batch(draw, &indices, &mut x, &mut y).unwrap();
        network.step(&x, &y, StepKey { seed: 0, step }, &mut optimizer, Progress::default()).unwrap();
        average.update(network.params());
    };
    (0..first).for_each(&mut step);
    let before = allocated();
    assert!(before > 0, "the counter counts");
    (first..first + steps).for_each(&mut step);
    allocated() - before
}

const NETWORKS: [&str; 4] = [
    "conv8k7-relu-pool-affine256-relu-affine10", // the three-layer net, its matrix updated in backward
    "[conv16-bn-relu-pool]x2-conv32-bn-relu-pool-[affine32-bn-relu-dropout0.5]-affine10", // im2col and Winograd
    "conv16s2-silu-avgpool2-conv16g4-leaky-pool3s2-gap-affine10-svm", // the general paths
    "conv160s4-se4-relu-gap-affine10",           // affine layers within a layer, both on panels
];

/// Many filters and few pixels: few images are cut by filters.
const DEEP: &str = "conv16k8s8p0-relu-conv96s2-bn-relu-conv160k1-relu-affine10";

/// So many filters that they come from memory: they are dealt out for more images than there are threads, too.
const WIDE: &str = "pool4-conv352k1s2p0-relu-conv352-relu-gap-affine10";

/// Affine layers, whose rows are dealt out where there are many.
const FLAT: &str = "pool4-affine300-relu-affine10";

/// Groups of images that are largest where they are multiples of four.
const GROUPS: &str = "pool4-conv64-relu-conv64-relu-gap-affine10";

/// Allocations of a session's calls, with every number of images.
fn session_allocations(notation: &str, batch: usize) -> usize {
    let spec: NetworkSpec = notation.parse().unwrap();
    let network = Network::<f32>::new(&spec, [3, 32, 32], Init::He, 0).unwrap();
    let session = Session::new(&network, batch).unwrap();
    let (x, mut scores) = (vec![0.5; batch * 3072], vec![0.0; batch * 10]);
    let mut scratch = session.scratch();
    let before = allocated();
    for images in (1..=batch).chain((1..=batch).rev()) {
        session.run(&x[..images * 3072], &mut scores[..images * 10], &mut scratch).unwrap();
    }
    allocated() - before
}

#[test]
fn a_step_allocates_nothing_after_the_first() {
    let images = Array4::from_shape_fn((64, 3, 32, 32), |(n, c, i, j)| (n * 7 + c * 31 + i * 5 + j * 3) as u8);
    let labels: Vec<u8> = (0..64).map(|n| n % 10).collect();
    let labelled = || (images.view(), &labels[..]);
    let data = Dataset::from_arrays(labelled(), labelled(), labelled(), Normalization::MeanImage).unwrap();
    let images = Array4::from_shape_fn((64, 1, 28, 20), |(n, _, i, j)| (n * 7 + i * 5 + j * 3) as f32);
    let labelled = || (images.view(), &labels[..]);
    let floats = Dataset::from_arrays(labelled(), labelled(), labelled(), Normalization::PerChannel).unwrap();
    // Inside the pool, as the solver works: a call from outside hands the work over through a queue that allocates.
    gemmnet::parallel::with_threads(2, || {
        for notation in NETWORKS {
            for clip in [None, Some(1.0)] {
                let what = format!("{notation}, clipped at {clip:?}");
                assert_eq!(allocations(notation, &data, clip, 1, 5), 0, "{what}");
                assert_eq!(allocations(notation, &floats, clip, 1, 5), 0, "{what}, on floats of another size");
            }
        }
    })
    .unwrap();
    for threads in [1, 2, 3] {
        gemmnet::parallel::with_threads(threads, || {
            for notation in NETWORKS.into_iter().chain([DEEP]) {
                assert_eq!(session_allocations(notation, 9), 0, "session of {notation}, {threads} threads");
            }
            assert_eq!(session_allocations(WIDE, 70), 0, "session of {WIDE}, {threads} threads");
            assert_eq!(session_allocations(FLAT, 300), 0, "session of {FLAT}, {threads} threads");
            assert_eq!(session_allocations(GROUPS, 100), 0, "session of {GROUPS}, {threads} threads");
        })
        .unwrap();
    }
}
