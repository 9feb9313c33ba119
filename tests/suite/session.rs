//! Inference sessions against the network they were made from.

use crate::common::{assert_close, random_array};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::nn::session::Session;
use gemmnet::parallel::with_threads;
use ndarray::{Array2, Array4, s};

/// A network whose batchnorms have seen some batches, so that folding them has something to do.
fn trained(notation: &str) -> Network<f64> {
    let mut network = Network::new(&notation.parse::<NetworkSpec>().unwrap(), [3, 12, 12], Init::He, 5).unwrap();
    for step in 0..5 {
        let x = random_array((8, 3, 12, 12), step) + 0.5;
        network.regularized_loss(x.view(), &[0, 1, 2, 3, 0, 1, 2, 3], 0.0).unwrap();
    }
    network
}

const NETWORKS: [&str; 7] = [
    "[conv6-bn-relu-conv6-bn-relu-pool]x2-[affine9-bn-relu-dropout0.5]-affine4",
    "conv5-relu-pool-affine7-relu-affine4",               // nothing to fold
    "bn-conv5s2-silu-bn-gap",                             // batchnorms without a product before them
    "conv6g3-bn-gelu-pool3s2-affine4-bn",                 // groups; batchnorm of the scores
    "conv6-pool-bn-relu-conv6-pool-bn-silu-pool-affine4", // pools before batchnorm
    "conv6-bn-relu-res[conv6-bn-relu-conv6-bn]-relu-res[conv8s2-bn-relu-conv8-bn]-relu-gap-affine4",
    "res[res[conv6-relu]-conv6]-gap-affine4", // values that live while others come and go
];

#[test]
fn a_session_scores_as_its_network_does() {
    for notation in NETWORKS {
        let mut network = trained(notation);
        let x: Array4<f64> = random_array((7, 3, 12, 12), 9);
        let want = network.predict(x.view()).unwrap();
        let session = Session::new(&network, 7).unwrap();
        let mut scratch = session.scratch();
        for images in [7, 1, 3] {
            let x = x.slice(s![..images, .., .., ..]);
            let mut got = Array2::zeros((images, network.classes()));
            session.run(x.as_slice().unwrap(), got.as_slice_mut().unwrap(), &mut scratch).unwrap();
            assert_close(&got, &want.slice(s![..images, ..]).to_owned(), 1e-12, 1000, notation);
        }
    }
}

/// In `f32`, where sessions have ways of their own: products on prepared panels, smaller tiles of Winograd's algorithm for few
/// images, and another algorithm where its filters would come from memory for few tiles.
#[test]
fn a_session_of_f32_scores_as_its_network_does() {
    let deep = "conv512k5s3-relu-conv512-bn-relu-conv512-relu-gap-affine70-relu-affine4";
    let wide = "conv16-relu-conv32-bn-relu-conv24-relu-pool-affine4";
    for notation in NETWORKS.into_iter().chain([deep, wide]) {
        let mut network = Network::<f32>::new(&notation.parse().unwrap(), [3, 12, 12], Init::He, 5).unwrap();
        let x: Array4<f32> = random_array((16, 3, 12, 12), 9);
        let labels: Vec<usize> = (0..16).map(|image| image % 4).collect();
        network.regularized_loss(x.view(), &labels, 0.0).unwrap();
        let want = network.predict(x.view()).unwrap();
        for batch in [1, 16] {
            let session = Session::new(&network, batch).unwrap();
            for threads in [1, 2, 5] {
                let mut got = Array2::zeros((16, network.classes()));
                let images = x.as_slice().unwrap().chunks_exact(batch * 3 * 12 * 12);
                with_threads(threads, || {
                    let mut scratch = session.scratch();
                    let scores = got.as_slice_mut().unwrap().chunks_exact_mut(batch * network.classes());
                    images.zip(scores).for_each(|(x, scores)| session.run(x, scores, &mut scratch).unwrap());
                })
                .unwrap();
                assert_close(&got, &want, 1e-5, 1000, &format!("{notation}, batch {batch}, {threads} threads"));
            }
        }
    }
}

/// Networks whose channels lie in blocks of sixteen wherever all who read them can, in `f32`.
const BLOCKED: [&str; 8] = [
    // both algorithms; pools within and after the product, of every kind; features of a volume that lies in blocks
    "conv16-bn-relu-conv32-bn-relu-pool-conv48-relu-pool3s2p1-conv16s2p1-silu-affine4",
    "conv16k5-relu-pool3-conv32-gelu-avgpool2-conv16k1-relu-affine9-affine4",
    "conv32k5s2p2-bn-relu-[res[conv32-bn-relu-conv32-bn]-relu]x2-res[conv64s2p1-bn-relu-conv64-bn]-relu-gap-affine4",
    "conv16-res[conv16-relu]-pool-pool3s2-affine4", // pools without a product
    "conv16-conv32-relu-pool3-conv16-relu-pool3-gap-affine4", // bands that are no tiles
    "conv32-bn-relu-pool5s5-conv16-gap",            // windows that tile all but a rest; a mean after a product
    // somebody among the readers needs planes: a layer, a convolution in groups, another number of channels, a pool before
    // batchnorm
    "conv16-relu-se4-conv16-relu-conv16g2-relu-conv32-relu-conv20-relu-conv32-relu-conv16-pool-bn-relu-conv16-gap-affine4",
    "conv16-res[conv16-relu-conv16g16-relu]-relu-res[conv16-relu-conv16]-pool-affine4",
];

/// A session of channels in blocks scores as its network does, and an image alone as in a batch, to the last bit, on any number of
/// threads; where OpenBLAS' AVX2 kernels make squeeze-and-excite's products, but for rounding.
#[test]
fn channels_in_blocks_change_no_score() {
    for notation in BLOCKED {
        let bands = notation.contains("pool3-conv16");
        for size in [12, 11, 17].into_iter().chain(bands.then_some(53)) {
            let mut network = Network::<f32>::new(&notation.parse().unwrap(), [3, size, size], Init::He, 5).unwrap();
            let x: Array4<f32> = random_array((8, 3, size, size), 9);
            let labels: Vec<usize> = (0..8).map(|i| i % 4).collect();
            network.regularized_loss(x.view(), &labels, 0.0).unwrap();
            let (want, session) = (network.predict(x.view()).unwrap(), Session::new(&network, 8).unwrap());
            let scores = |images: usize, threads| {
                let mut got = Array2::<f32>::zeros((8, network.classes()));
                let x = x.as_slice().unwrap().chunks(images * 3 * size * size);
                with_threads(threads, || {
                    let mut scratch = session.scratch();
                    let scores = got.as_slice_mut().unwrap().chunks_mut(images * network.classes());
                    x.zip(scores).for_each(|(x, scores)| session.run(x, scores, &mut scratch).unwrap());
                })
                .unwrap();
                got
            };
            let first = scores(8, 1);
            assert_close(&first, &want, 1e-5, 1000, &format!("{notation}, {size}"));
            for (images, threads) in [(8, 2), (1, 1), (1, 2), (3, 1), (3, 2), (8, 5), (1, 5)] {
                let (got, what) =
                    (scores(images, threads), format!("{notation}, {size}: {images} on {threads} threads"));
                if notation.contains("se4") && !gemmnet::blas::setup().rows_alike {
                    assert_close(&got, &first, 1e-5, 1000, &what);
                } else {
                    assert_eq!(got, first, "{what}");
                }
            }
        }
    }
}

#[test]
fn threads_share_a_session() {
    let network = trained(NETWORKS[0]);
    let session = Session::new(&network, 4).unwrap();
    let run = &|seed| {
        let x: Array4<f64> = random_array((4, 3, 12, 12), seed);
        let mut scores = vec![0.0; 16];
        let mut scratch = session.scratch();
        for _ in 0..20 {
            session.run(x.as_slice().unwrap(), &mut scores, &mut scratch).unwrap();
        }
        scores
    };
    let alone: Vec<_> = (0..4).map(run).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || run(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

/// Tasks of one small pool that run sessions, and so wait inside of each other's work: none locks another out, and each has
/// its own scores.
#[test]
fn tasks_of_a_pool_run_sessions_within_each_other() {
    use rayon::prelude::*;
    let network = trained(NETWORKS[0]);
    let session = Session::new(&network, 4).unwrap();
    let run = |seed: usize| {
        let x: Array4<f64> = random_array((4, 3, 12, 12), seed as u64);
        let (mut scores, mut scratch) = (vec![0.0; 16], session.scratch());
        (0..5).for_each(|_| session.run(x.as_slice().unwrap(), &mut scores, &mut scratch).unwrap());
        scores
    };
    let alone: Vec<_> = (0..32).map(run).collect();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let within: Vec<_> = pool.install(|| (0..32).into_par_iter().map(run).collect());
        assert_eq!(within, alone, "{threads} threads");
    }
}

/// A view in another layout than the standard one is read as what it shows.
#[test]
fn views_are_images_too() {
    let network = trained(NETWORKS[1]);
    let session = Session::new(&network, 3).unwrap();
    let (mut scratch, classes) = (session.scratch(), network.classes());
    let x: Array4<f64> = random_array((3, 3, 12, 12), 5);
    let (mut want, mut got) = (vec![0.0; 3 * classes], vec![0.0; 3 * classes]);
    session.run(x.as_slice().unwrap(), &mut want, &mut scratch).unwrap();
    let columns_first = x.t().as_standard_layout().into_owned();
    session.run_view(columns_first.t(), &mut got, &mut scratch).unwrap();
    assert_eq!(got, want);
    assert!(session.run_view(x.slice(s![.., ..2, .., ..]), &mut got, &mut scratch).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let network = trained(NETWORKS[1]);
    assert!(Session::new(&network, 0).is_err());
    let session = Session::new(&network, 2).unwrap();
    let (mut scratch, mut scores) = (session.scratch(), [0.0; 12]);
    let error = session.run(&[0.0; 3 * 432], &mut scores, &mut scratch).unwrap_err();
    assert!(error.to_string().contains("3 images, more than the 2"), "{error}");
    assert!(session.run(&[0.0; 431], &mut scores[..4], &mut scratch).is_err());
}
