//! Files of networks: without a training, and of an earlier version of the format.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use gemmnet::Error;
use gemmnet::data::{Dataset, Draw, Normalization, Split};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::optim::{Group, LearningRate};
use gemmnet::train::{Checkpoint, History, Model, Solver, SolverOptions};
use ndarray::Array4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// As in `tests/fixtures/format_1.rs`.
fn images() -> Dataset {
    let images = |count: usize, seed: usize| {
        let labels: Vec<u8> = (0..count).map(|n| (n % 3) as u8).collect();
        let pixels = Array4::from_shape_fn((count, 3, 32, 32), |(n, c, h, w)| {
            let noise = (n * 7919 + c * 104_729 + h * 1_299_709 + w * 15_485_863 + seed * 32_452_843) / 64 % 120;
            (noise + if h / 11 == n % 3 { 120 } else { 0 }) as u8
        });
        (pixels, labels)
    };
    let [train, validation, test] = [(26, 1), (20, 2), (10, 3)].map(|(count, seed)| images(count, seed));
    Dataset::from_arrays(
        (train.0.view(), &train.1),
        (validation.0.view(), &validation.1),
        (test.0.view(), &test.1),
        Normalization::PerChannel,
    )
    .unwrap()
}

/// Within the roundings of sums in another order.
#[track_caller]
fn assert_close(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}: {got}, not {want}");
    }
}

/// A training that the first version of the format has interrupted goes on to where that version took it.
#[test]
fn checkpoints_of_format_1_load_and_resume() {
    #[derive(serde::Deserialize)]
    struct Reached {
        #[serde(flatten)]
        history: History,
        best_epoch: usize,
        scores: Vec<f64>,
    }
    let reached: Reached = serde_json::from_slice(&fs::read(fixture("format_1.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::<f64>::load(&fixture("format_1.safetensors")).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.epoch()), (5, 1));
    let rate = LearningRate::new(1e-2, "exp:0.9".parse().unwrap(), 0.5).unwrap();
    assert_eq!(checkpoint.options.groups, Group::classic("adamw".parse().unwrap(), rate, 1e-3));
    assert_eq!((checkpoint.options.clip_norm, checkpoint.options.ema), (None, None));
    assert_eq!(checkpoint.trained.history.loss, reached.history.loss[..5]);
    assert_eq!(Model::<f64>::load(&fixture("format_1.safetensors")).unwrap().class_names, ["0", "1", "2"]);

    let data = images();
    let mut solver = Solver::resume(checkpoint, data.clone()).unwrap();
    let report = solver.train(|_| ControlFlow::Continue(())).unwrap();
    assert_eq!((report.steps, report.kept_epoch), (12, reached.best_epoch));
    let history = solver.history();
    assert_close(&history.loss, &reached.history.loss, "loss");
    assert_close(&history.train_accuracy, &reached.history.train_accuracy, "training accuracy");
    assert_close(&history.val_accuracy, &reached.history.val_accuracy, "validation accuracy");
    assert_close(&history.learning_rate, &reached.history.learning_rate, "learning rate");
    let (mut x, mut y, mut scores) = (vec![0.0; 10 * data.image_len()], vec![0; 10], vec![0.0; 30]);
    data.fill_batch(Draw::plain(Split::Test), &(0..10).collect::<Vec<_>>(), &mut x, &mut y).unwrap();
    solver.network_mut().scores(&x, &mut scores).unwrap();
    assert_close(&scores, &reached.scores, "scores");

    // From now on it is one of this version.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("again.safetensors");
    solver.checkpoint().save(&path).unwrap();
    assert_eq!(Checkpoint::<f64>::load(&path).unwrap().options, solver.checkpoint().options);
}

#[test]
fn a_network_is_saved_and_loaded_without_a_solver() {
    let spec = "conv4-bn-relu-pool-affine5-svm".parse().unwrap();
    let mut network = Network::<f32>::new(&spec, [2, 10, 6], Init::He, 3).unwrap();
    let x: Vec<f32> = (0..3 * 120).map(|i| (i as f32).sin()).collect();
    network.loss(&x, &[0, 4, 2], StepKey::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("network.safetensors");
    network.save(&path).unwrap();
    let mut loaded = Network::<f32>::load(&path).unwrap();
    assert_eq!((loaded.spec(), loaded.input()), (network.spec(), [2, 10, 6]));
    assert_eq!(loaded.params().values(), network.params().values());
    assert_eq!(loaded.statistics().values(), network.statistics().values());
    let scores = [&mut network, &mut loaded].map(|network| {
        let mut scores = [0.0; 15];
        network.scores(&x, &mut scores).unwrap();
        scores
    });
    assert_eq!(scores[0], scores[1]);
    let bytes = fs::read(&path).unwrap();
    loaded.save(&path).unwrap();
    assert!(fs::read(&path).unwrap() == bytes, "the same network is the same file");

    let message = Network::<f64>::load(&path).unwrap_err().to_string();
    assert!(message.contains("f32 numbers") && message.contains("load it as f32"), "{message}");
    let error = Checkpoint::<f32>::load(&path).unwrap_err();
    assert!(matches!(error, Error::Data { .. }) && error.to_string().contains("without its training"), "{error}");
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let message = Network::<f32>::load(&path).unwrap_err().to_string();
    assert!(message.contains("network.safetensors: ") && message.contains("cut off"), "{message}");
    let nowhere = dir.path().join("nowhere").join("network.safetensors");
    assert!(matches!(network.save(&nowhere), Err(Error::Io { .. })));
    assert!(matches!(Network::<f32>::load(&nowhere), Err(Error::Io { .. })));
}

/// Into a network that is there; one that does not fit stays as it was.
#[test]
fn values_are_loaded_by_name() {
    let network =
        |notation: &str, seed| Network::<f64>::new(&notation.parse().unwrap(), [1, 4, 4], Init::He, seed).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("network.safetensors");
    let mut saved = network("conv3-bn-gap-affine2", 0);
    saved.statistics_mut().get_mut("bn1.running_mean").unwrap().fill(0.25);
    saved.save(&path).unwrap();
    // Other activations and another loss have the same parameters.
    let mut other = network("conv3-bn-silu-gap-affine2-svm", 1);
    other.load_values(&path).unwrap();
    assert_eq!(other.params().values(), saved.params().values());
    assert_eq!(other.statistics().values(), saved.statistics().values());
    for (notation, part) in
        [("conv3-bn-gap-affine3", "`affine1.weight`"), ("conv3-bn-gap-affine2-affine2", "`affine2.")]
    {
        let mut other = network(notation, 1);
        let message = other.load_values(&path).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
        assert_eq!(other.params().values(), network(notation, 1).params().values());
    }
}

#[test]
fn the_best_network_of_a_checkpoint_is_a_network() {
    let spec = "conv2k5s3-bn-relu-pool-affine3".parse().unwrap();
    let network = Network::<f32>::new(&spec, [3, 32, 32], Init::He, 1).unwrap();
    let options =
        SolverOptions { epochs: 2.0, batch_size: 8, ema: Some(0.5), verbose: false, ..SolverOptions::default() };
    let mut solver = Solver::new(network, images(), options).unwrap();
    solver.train(|_| ControlFlow::Continue(())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    solver.checkpoint().save(&path).unwrap();
    let loaded = Network::<f32>::load(&path).unwrap();
    assert_eq!(loaded.params().values(), solver.network_mut().params().values());
    assert_eq!(loaded.statistics().values(), solver.network_mut().statistics().values());
}

/// A file with other text in its header.
fn rewritten(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(file[8..8 + len].to_vec()).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replace(from, to);
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &file[8 + len..]].concat()
}

/// See fuzz/fuzz_targets/checkpoint.rs.
#[test]
fn files_with_strange_numbers_and_names_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("strange.safetensors");
    let file = fs::read(fixture("format_1.safetensors")).unwrap();
    // More iterations than have an epoch after them.
    let all = [r#"\"step\":5,\"#, r#"\"batch_size\":8"#];
    let endless = rewritten(&file, all[0], &all[0].replace('5', &usize::MAX.to_string()));
    fs::write(&path, rewritten(&endless, all[1], r#"\"batch_size\":26"#)).unwrap();
    let error = Checkpoint::<f64>::load(&path).unwrap_err().to_string();
    assert!(error.contains("history.loss"), "{error}");
    // What would clear a terminal.
    fs::write(&path, rewritten(&file, r#"\"f64\""#, r#"\"\\u001b[2J\\n\""#)).unwrap();
    let error = Checkpoint::<f64>::load(&path).unwrap_err().to_string();
    assert!(error.contains("a network of  [2J  numbers") && !error.contains(char::is_control), "{error:?}");
}
