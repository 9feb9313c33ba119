//! Training: what it reaches, what it remembers, that it repeats to the bit, and that nothing is lost when it goes wrong.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use gemmnet::data::cifar10::{DIM, PIXELS, SIDE};
use gemmnet::data::{Augment, Batches, Dataset, Draw, Flip, Normalization, Normalizer, Sampler, Split, Views};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::optim::{Ema, Group, LearningRate, Optimizer, Progress, Select};
use gemmnet::parallel::with_threads;
use gemmnet::params::Params;
use gemmnet::random::{Purpose, stream};
use gemmnet::train::{
    Checkpoint, Event, History, Keep, Model, Report, Solver, SolverOptions, Trained, accuracy, predict,
};
use gemmnet::{Element, Error};
use ndarray::Array4;
use rand::RngExt;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

/// Every kind of layer whose training depends on more than parameters: running statistics and random masks.
const NOTATION: &str = "conv4-bn-relu-pool-dropout0.2-affine12-bn-relu-affine10";
/// Training images of [`images`]: three batches of 8, and two images left over.
const IMAGES: usize = 26;
const STEPS_PER_EPOCH: usize = 3;

/// Ten classes, each with a bright square of its own in noise.
fn images() -> Dataset {
    let split = |count: usize, seed| {
        let mut rng = stream(seed, Purpose::Example, 0, 0);
        let labels: Vec<u8> = (0..count).map(|i| (i % 10) as u8).collect();
        let pixels = Array4::from_shape_fn((count, 3, SIDE, SIDE), |(n, _, h, w)| {
            let class = n % 10;
            let bright = h / 8 == class / 4 && w / 8 == class % 4;
            rng.random_range(0..120_u8) + if bright { 120 } else { 0 }
        });
        (pixels, labels)
    };
    let [train, validation, test] = [(IMAGES, 1), (20, 2), (10, 3)].map(|(count, seed)| split(count, seed));
    Dataset::from_arrays(
        (train.0.view(), &train.1),
        (validation.0.view(), &validation.1),
        (test.0.view(), &test.1),
        Normalization::PerChannel,
    )
    .unwrap()
}

fn network<T: Element>(notation: &str) -> Network<T> {
    Network::new(&NetworkSpec::parse(notation).unwrap(), DIM, Init::He, 1).unwrap()
}

fn rate(base: f64, schedule: &str) -> LearningRate {
    LearningRate::new(base, schedule.parse().unwrap(), 0.0).unwrap()
}

/// One rule and rate for all.
fn classic(rule: &str, rate: LearningRate) -> Vec<Group> {
    Group::classic(rule.parse().unwrap(), rate, 1e-3)
}

/// Muon for filters, momentum for the other weights, Adam for biases; batchnorm's scale as it is.
fn mixed() -> Vec<Group> {
    let group = |select: &str, rule: &str, rate| Group::new(select.parse().unwrap(), rule.parse().unwrap(), rate);
    vec![
        Group::frozen(Select::SCALES),
        Group { l2: 1e-3, ..group("conv*.weight", "muon", rate(1e-2, "cosine")) },
        Group { l2: 1e-3, ..group("weight", "momentum", rate(1e-2, "constant")) },
        group("*", "adam", rate(1e-3, "exp:0.9")),
    ]
}

fn options() -> SolverOptions {
    SolverOptions {
        epochs: 4.0,
        batch_size: 8,
        groups: classic("adam", rate(1e-3, "constant")),
        augment: Some(Augment { flip: Flip::Random, shift: 2, ..Augment::NONE }),
        seed: 3,
        train_accuracy_samples: 10,
        verbose: false,
        ..SolverOptions::default()
    }
}

fn solver<T: Element>(options: SolverOptions) -> Solver<T> {
    Solver::new(network(NOTATION), images(), options).unwrap()
}

fn to_the_end<T: Element>(solver: &mut Solver<T>) -> Report {
    solver.train(|_| ControlFlow::Continue(())).unwrap()
}

/// An observer that ends training after iteration `last`.
fn until(last: usize) -> impl FnMut(&Event) -> ControlFlow<()> {
    move |event| match *event {
        Event::Step { step, .. } if step >= last => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    }
}

/// The whole state as bytes.
fn state<T: Element>(solver: &Solver<T>) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    solver.checkpoint().save(&path).unwrap();
    fs::read(path).unwrap()
}

/// As two processes would do it.
fn save_and_load<T: Element>(solver: &Solver<T>) -> Checkpoint<T> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("interrupted.safetensors");
    solver.checkpoint().save(&path).unwrap();
    Checkpoint::load(&path).unwrap()
}

/// The training loop written out by hand, from the parts that it is made of.
#[test]
fn a_solver_does_what_its_parts_do() {
    let data = images();
    let options = SolverOptions {
        epochs: 3.0,
        groups: mixed(),
        clip_norm: Some(0.5),
        train_accuracy_samples: IMAGES,
        ..options()
    };
    let mut by_hand = network::<f32>(NOTATION);
    let start = by_hand.params().clone();
    let mut optimizer = Optimizer::new(options.groups.clone(), by_hand.params()).unwrap();
    optimizer.set_clip_norm(options.clip_norm).unwrap();
    let mut average = [by_hand.params(), by_hand.statistics()].map(|params| Ema::new(0.8, params).unwrap());
    let (mut latest, mut averages) = (Vec::new(), Vec::new());
    let batches = Batches::new(IMAGES, 8).unwrap();
    let (mut x, mut y, mut order, mut losses) = (vec![0.0; 8 * data.image_len()], vec![0; 8], Vec::new(), Vec::new());
    for epoch in 0..3 {
        options.sampler.order(batches, options.seed, epoch, &mut order);
        for indices in order.chunks_exact(8) {
            let step = losses.len();
            let draw = Draw::augmented(Split::Train, options.augment, options.seed, epoch);
            data.fill_batch(draw, indices, &mut x, &mut y).unwrap();
            let loss = by_hand.loss(&x, &y, StepKey { seed: options.seed, step: step as u64 }).unwrap();
            let (params, grads) = by_hand.params_and_grads();
            let at = Progress { step, steps_per_epoch: STEPS_PER_EPOCH, steps: 9 };
            losses.push(f64::from(loss) + optimizer.step(params, grads, at).regularization);
            average[0].update(by_hand.params());
            average[1].update(by_hand.statistics());
            if step == 0 || losses.len() % STEPS_PER_EPOCH == 0 {
                latest.push([by_hand.params(), by_hand.statistics()].map(Params::clone));
                averages.push([0, 1].map(|i| average[i].params().clone()));
            }
        }
    }
    assert_eq!(by_hand.params().get("bn1.weight"), start.get("bn1.weight"), "frozen");
    assert_ne!(by_hand.params().get("bn1.bias"), start.get("bn1.bias"));

    // The same training, measured by the parameters and by their average.
    for (ema, of_epoch) in [(None, latest), (Some(0.8), averages)] {
        let mut solver = solver::<f32>(SolverOptions { ema, ..options.clone() });
        let report = to_the_end(&mut solver);
        assert_eq!(solver.history().loss, losses, "{ema:?}");
        for (epoch, [params, statistics]) in of_epoch.iter().enumerate() {
            by_hand.params_mut().copy_from(params);
            by_hand.statistics_mut().copy_from(statistics);
            let history = solver.history();
            let what = format!("{ema:?}, epoch {epoch}");
            assert_eq!(
                history.val_accuracy[epoch],
                accuracy(&mut by_hand, &data, Split::Validation, 8, Views::One).unwrap(),
                "{what}"
            );
            assert_eq!(
                history.train_accuracy[epoch],
                accuracy(&mut by_hand, &data, Split::Train, 8, Views::One).unwrap(),
                "{what}"
            );
        }
        let [params, statistics] = &of_epoch[report.kept_epoch];
        assert_eq!(solver.network_mut().params().values(), params.values(), "{ema:?}");
        assert_eq!(solver.network_mut().statistics().values(), statistics.values(), "{ema:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_at_any_number_of_threads() {
    let train = |threads, seed| {
        with_threads(threads, || {
            let mut solver = solver::<f32>(SolverOptions { epochs: 2.0, seed, ..options() });
            to_the_end(&mut solver);
            state(&solver)
        })
        .unwrap()
    };
    let alone = train(1, 3);
    for threads in [1, 2, 5] {
        assert!(train(threads, 3) == alone, "{threads} threads differ from one");
    }
    assert!(train(1, 4) != alone, "another seed trains differently");
}

/// Interrupted after iteration `stop`, saved, loaded and resumed: the file at the end is that of an uninterrupted run,
/// byte for byte. Iterations 3, 6, ... end an epoch.
#[test]
fn resumed_training_is_exact() {
    fn check<T: Element>(name: &str, options: SolverOptions) {
        let mut whole = solver::<T>(options.clone());
        to_the_end(&mut whole);
        let whole = state(&whole);
        for stop in [1, 2, 3, 7, 11, 12] {
            let mut first = solver::<T>(options.clone());
            let report = first.train(until(stop)).unwrap();
            assert_eq!((report.steps, report.stopped_early), (stop, stop < 12), "{name}");
            let mut second = Solver::resume(save_and_load(&first), images()).unwrap();
            let report = to_the_end(&mut second);
            assert_eq!((report.steps, report.stopped_early), (12, false), "{name}");
            assert!(state(&second) == whole, "{name}, interrupted after {stop}");
            // The same without leaving the process.
            to_the_end(&mut first);
            assert!(state(&first) == whole, "{name}, continued after {stop}");
        }
    }
    let with = |rule: &str, rate, sampler| SolverOptions { groups: classic(rule, rate), sampler, ..options() };
    let with_all = SolverOptions { groups: mixed(), clip_norm: Some(0.5), ema: Some(0.8), ..options() };
    check::<f32>("groups, clipped, with an average", with_all);
    check::<f32>("adam", with("adam", rate(1e-3, "constant"), Sampler::ShuffledEpochs));
    check::<f32>("nesterov", with("nesterov", rate(3e-2, "onecycle"), Sampler::WithReplacement));
    check::<f64>("sgd", with("sgd", rate(1e-2, "cosine"), Sampler::ShuffledEpochs));
    check::<f64>("rmsprop", with("rmsprop", rate(1e-3, "exp:0.9"), Sampler::ShuffledEpochs));
}

/// Two epochs, saved and loaded, then raised to four, are four epochs.
#[test]
fn a_checkpoint_can_be_given_more_epochs() {
    let mut whole = solver::<f32>(options());
    to_the_end(&mut whole);
    let mut half = solver::<f32>(SolverOptions { epochs: 2.0, ..options() });
    to_the_end(&mut half);
    let mut checkpoint = save_and_load(&half);
    assert_eq!((checkpoint.step(), checkpoint.epoch()), (6, 2));
    checkpoint.options.epochs = 4.0;
    // Whatever the data's own normalisation, the checkpoint's is what counts.
    let other = Normalizer::new(DIM, vec![0.0; PIXELS], vec![9.0; 3]).unwrap();
    let mut resumed = Solver::resume(checkpoint, images().with_normalizer(other).unwrap()).unwrap();
    to_the_end(&mut resumed);
    assert!(state(&resumed) == state(&whole));
}

/// Rates, decays, clipping and the average may be others from then on.
#[test]
fn a_checkpoint_can_be_given_other_options() {
    let mut first = solver::<f32>(SolverOptions { epochs: 1.0, groups: mixed(), ..options() });
    to_the_end(&mut first);
    let resumed = |change: fn(&mut SolverOptions)| {
        let mut checkpoint = save_and_load(&first);
        checkpoint.options.epochs = 2.0;
        change(&mut checkpoint.options);
        let mut solver = Solver::resume(checkpoint, images()).unwrap();
        to_the_end(&mut solver);
        solver
    };
    let plain = resumed(|_| ());
    let slower = resumed(|o| o.groups[3].learning_rate = rate(1e-6, "constant"));
    let clipped = resumed(|o| o.clip_norm = Some(1e-3));
    let averaged = resumed(|o| o.ema = Some(0.9));
    for (solver, what) in [(&slower, "rate"), (&clipped, "clipping")] {
        assert_eq!(solver.history().loss[..4], plain.history().loss[..4], "{what}");
        assert_ne!(solver.history().loss[5], plain.history().loss[5], "{what}");
    }
    assert_eq!(averaged.history().loss, plain.history().loss);
    // The average goes on with another decay, and may be given up.
    for ema in [Some(0.5), None] {
        let mut checkpoint = save_and_load(&averaged);
        (checkpoint.options.epochs, checkpoint.options.ema) = (3.0, ema);
        let mut solver = Solver::resume(checkpoint, images()).unwrap();
        to_the_end(&mut solver);
        assert_eq!(save_and_load(&solver).options.ema, ema);
    }
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let mut solver = solver::<f32>(SolverOptions { epochs: 2.0, ..options() });
    to_the_end(&mut solver);
    type Change = fn(&mut SolverOptions);
    let cases: [(Change, usize, &str); 8] = [
        (|_| (), IMAGES - 1, "26 images in batches of 8, not on 25 in batches of 8"),
        (|o| o.batch_size = 9, IMAGES, "in batches of 9"),
        (|o| o.epochs = 1.0, IMAGES, "has done 6 iterations, more than 3"),
        (|o| o.groups = classic("sgd", rate(0.1, "constant")), IMAGES, "update rule"),
        (|o| o.groups[0].frozen = true, IMAGES, "the state of conv1.weight"),
        (|o| o.groups[0].l2 = -1.0, IMAGES, "-1 is not"),
        (|o| o.clip_norm = Some(0.0), IMAGES, "0 is not"),
        (|o| o.ema = Some(1.0), IMAGES, "decay of 1"),
    ];
    for (change, len, part) in cases {
        let mut checkpoint = save_and_load(&solver);
        change(&mut checkpoint.options);
        let error = Solver::resume(checkpoint, images().limit(Split::Train, len).unwrap()).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    }
}

/// The last network is kept where that is asked for, though an earlier one is better, and by a checkpoint as well.
#[test]
fn the_last_network_is_kept_where_that_is_asked_for() {
    let data = images();
    let options =
        SolverOptions { epochs: 3.0, groups: classic("adam", rate(2e-3, "step:2:1e6")), keep: Keep::Last, ..options() };
    let mut solver = Solver::<f32>::new(network(NOTATION), data.clone(), options).unwrap();
    let report = to_the_end(&mut solver);
    assert!(report.final_val_accuracy < solver.history().best().unwrap().1, "the rate ruins the network: {report:?}");
    assert_eq!((report.kept_epoch, report.kept_val_accuracy), (3, report.final_val_accuracy));
    let mut kept: Trained<f32> = save_and_load(&solver).trained;
    for network in [solver.network_mut(), &mut kept.network] {
        assert_eq!(accuracy(network, &data, Split::Validation, 7, Views::One).unwrap(), report.kept_val_accuracy);
    }
}

/// In the last epoch the learning rate is a million times what it was, which ruins the network: what came before counts.
#[test]
fn the_best_network_is_kept_with_its_statistics() {
    let data = images();
    let options = SolverOptions {
        epochs: 13.0,
        augment: None,
        groups: classic("adam", rate(2e-3, "step:12:1e6")),
        train_accuracy_samples: 1000,
        ..options()
    };
    let mut solver = Solver::<f32>::new(network(NOTATION), data.clone(), options).unwrap();
    let report = to_the_end(&mut solver);
    let history = solver.history().clone();
    let best = history.val_accuracy.iter().copied().fold(0.0, f64::max);
    assert_eq!(report.kept_val_accuracy, best);
    assert_eq!(history.best(), Some((report.kept_epoch, best)));
    assert_eq!(report.final_val_accuracy, history.val_accuracy[13]);
    assert_eq!(report.final_train_accuracy, history.train_accuracy[13]);
    assert!(best >= 0.5 && report.kept_epoch <= 12, "{report:?}");
    assert!(report.final_val_accuracy < best, "the rate ruins the network: {report:?}");

    assert_eq!(accuracy(solver.network_mut(), &data, Split::Validation, 7, Views::One).unwrap(), best);
    let mut trained: Trained<f32> = save_and_load(&solver).trained;
    assert_eq!(accuracy(&mut trained.network, &data, Split::Validation, 20, Views::One).unwrap(), best);
    assert_eq!(trained.history, history);
    assert_eq!(trained.network.statistics().values(), solver.network_mut().statistics().values());
    assert_eq!(solver.into_network().params().values(), trained.network.params().values());
}

#[test]
fn events_and_history_tell_the_same_story() {
    let mut events = Vec::new();
    let options = SolverOptions { epochs: 2.0, groups: classic("adam", rate(1e-3, "exp:0.5")), ..options() };
    let mut solver = solver::<f32>(options);
    let report = solver
        .train(|event| {
            events.push(*event);
            ControlFlow::Continue(())
        })
        .unwrap();
    let history = solver.history();
    let mut story = Vec::new();
    for event in events {
        match event {
            Event::Step { epoch, epochs, step, steps, loss, learning_rate, seconds, images_per_second } => {
                assert_eq!((epochs, steps, epoch), (2.0, 6, (step - 1) / STEPS_PER_EPOCH + 1));
                assert_eq!(loss, history.loss[step - 1]);
                assert_eq!(learning_rate, if epoch == 1 { 1e-3 } else { 5e-4 });
                assert!(images_per_second > 0.0 && seconds > 0.0);
                story.push(format!("step {step}"));
            }
            Event::Epoch { epoch, epochs, train_accuracy, val_accuracy, kept } => {
                assert_eq!(epochs, 2.0);
                assert_eq!(train_accuracy, history.train_accuracy[epoch]);
                assert_eq!(val_accuracy, history.val_accuracy[epoch]);
                assert_eq!(kept, history.val_accuracy[..epoch].iter().all(|&before| val_accuracy > before));
                story.push(format!("epoch {epoch}"));
            }
        }
    }
    let expected =
        ["step 1", "epoch 0", "step 2", "step 3", "epoch 1", "step 4", "step 5", "step 6", "epoch 2"].map(String::from);
    assert_eq!(story, expected);
    assert_eq!(history.learning_rate, [1e-3, 1e-3, 5e-4]);
    assert_eq!([history.loss.len(), history.train_accuracy.len(), history.val_accuracy.len()], [6, 3, 3]);
    assert!(report.train_seconds > 0.0 && report.images_per_second > 0.0 && !report.stopped_early);
    let json = serde_json::to_string(history).unwrap();
    let read: History = serde_json::from_str(&json).unwrap();
    assert_eq!(read.val_accuracy, history.val_accuracy);

    let report = to_the_end(&mut solver);
    assert_eq!((report.steps, report.train_seconds, report.images_per_second), (6, 0.0, 0.0), "nothing is left to do");
}

/// `l2 / 2` times the sum of the squared weights, no biases, is part of the loss; the gradient shrinks the weights.
#[test]
fn regularisation_is_in_the_loss_and_in_the_step() {
    let notation = "conv4-relu-pool-affine10";
    let first = |l2| {
        let groups = Group::classic("sgd".parse().unwrap(), rate(1e-3, "constant"), l2);
        let options = SolverOptions { groups, augment: None, ..options() };
        let mut network = network::<f64>(notation);
        network.params_mut().get_mut("affine1.bias").unwrap().fill(5.0);
        let mut solver = Solver::new(network, images(), options).unwrap();
        solver.train(until(1)).unwrap();
        (solver.history().loss[0], solver.into_network())
    };
    let ((plain, without), (regularised, with)) = (first(0.0), first(0.5));
    let start = network::<f64>(notation);
    let weights = ["conv1.weight", "affine1.weight"].map(|name| start.params().get(name).unwrap().to_owned());
    let squares: f64 = weights.iter().flatten().map(|w| w * w).sum();
    let expected = plain + 0.25 * squares;
    assert!((regularised - expected).abs() <= 1e-6 * expected, "{regularised}, not {expected}");
    for (name, weights) in ["conv1.weight", "affine1.weight"].into_iter().zip(weights) {
        let moved = &without.params().get(name).unwrap() - &with.params().get(name).unwrap();
        let worst = (moved - 1e-3 * 0.5 * &weights).iter().fold(0.0, |worst: f64, d| worst.max(d.abs()));
        assert!(worst <= 1e-12, "{name}: {worst}");
    }
    assert_eq!(without.params().get("affine1.bias"), with.params().get("affine1.bias"));
}

/// A loss that is no number ends training at once; the best network, the history and the last checkpoint stay.
#[test]
fn divergence_loses_nothing() {
    let data = images();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let options = SolverOptions { epochs: 9.0, groups: classic("sgd", rate(1e-2, "step:2:1e35")), ..options() };
    let mut solver = Solver::<f32>::new(network("conv4-relu-pool-affine10"), data.clone(), options).unwrap();
    solver.save_to(&path);
    let error = solver.train(|_| ControlFlow::Continue(())).unwrap_err();
    let Error::Diverged { iteration, loss, learning_rate, .. } = error else { panic!("{error}") };
    assert!((7..=9).contains(&iteration) && !loss.is_finite() && learning_rate > 1e30, "{iteration} {loss}");
    let history = solver.history().clone();
    assert_eq!(history.loss.len(), iteration - 1);
    assert!(history.loss.iter().all(|loss| loss.is_finite()));
    assert_eq!(history.val_accuracy.len(), 3);
    let (_, best) = history.best().unwrap();
    assert!(solver.network_mut().params().values().iter().all(|value| value.is_finite()));
    assert_eq!(accuracy(solver.network_mut(), &data, Split::Validation, 8, Views::One).unwrap(), best);
    assert_eq!(Checkpoint::<f32>::load(&path).unwrap().step(), 6, "the last checkpoint is from before");

    // From the first iteration on: the network is as it was.
    let spec = NetworkSpec::parse("conv4-relu-pool-affine10").unwrap();
    let network = || Network::<f32>::new(&spec, DIM, Init::Gaussian { std: 1e25 }, 1).unwrap();
    let mut solver = Solver::new(network(), data, self::options()).unwrap();
    let error = solver.train(|_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::Diverged { iteration: 1, .. }), "{error}");
    assert!(solver.history().loss.is_empty());
    assert_eq!(solver.into_network().params().values(), network().params().values());
}

/// Memory is taken for the epoch at hand, not for all that are planned.
#[test]
fn any_number_of_epochs_can_be_begun() {
    let mut solver = solver::<f32>(SolverOptions { epochs: f64::MAX, ..options() });
    assert_eq!(solver.train(until(4)).unwrap().steps, 4);
    assert!(solver.history().loss.capacity() < 100);
}

/// A step without a loss is none: parameters, running statistics, moments, average and history are as they were.
#[test]
fn a_diverged_step_leaves_no_trace() {
    let mut network = network::<f32>(NOTATION);
    network.params_mut().get_mut("affine2.bias").unwrap()[[3]] = f32::NAN;
    let options = SolverOptions { groups: mixed(), ema: Some(0.5), ..options() };
    let mut solver = Solver::new(network, images(), options).unwrap();
    let before = state(&solver);
    for _ in 0..2 {
        let error = solver.train(|_| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, Error::Diverged { iteration: 1, .. }), "{error}");
        assert!(state(&solver) == before);
    }
}

#[test]
fn checkpoints_are_saved_after_every_epoch_and_when_the_observer_ends_training() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let mut solver = solver::<f32>(options());
    solver.save_to(&path);
    let mut saved = Vec::new();
    let report = solver
        .train(|event| match event {
            // What an earlier iteration has left.
            Event::Step { step, .. } => {
                saved.push(Checkpoint::<f32>::load(&path).map_or(0, |saved| saved.trained.history.loss.len()));
                if *step == 8 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }
            Event::Epoch { .. } => ControlFlow::Continue(()),
        })
        .unwrap();
    assert!(report.stopped_early);
    assert_eq!(saved, [0, 0, 0, 3, 3, 3, 6, 6]);
    assert_eq!(Checkpoint::<f32>::load(&path).unwrap().step(), 8);
    assert!(fs::read(&path).unwrap() == state(&solver));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
}

/// What cannot be written leaves the old file and says what to do; training can then go on.
#[test]
fn a_checkpoint_that_cannot_be_saved_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut solver = solver::<f32>(options());
    solver.save_to(dir.path().join("nowhere").join("run.safetensors"));
    let error = solver.train(|_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("cannot write") && error.contains("nowhere") && error.contains("MB of free"), "{error}");
    // A folder in its place cannot be replaced.
    let occupied = dir.path().join("occupied");
    fs::create_dir(&occupied).unwrap();
    assert!(matches!(solver.checkpoint().save(&occupied), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");

    solver.save_to(dir.path().join("run.safetensors"));
    assert_eq!(to_the_end(&mut solver).steps, 12);
    let mut whole = self::solver::<f32>(options());
    to_the_end(&mut whole);
    assert!(state(&solver) == state(&whole));
}

/// Rewrites a checkpoint with other metadata or without a tensor.
fn rewrite(bytes: &[u8], metadata: impl Fn(String) -> String, keep: impl Fn(&str) -> bool) -> Vec<u8> {
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let header = header.metadata().clone().unwrap().into_iter().map(|(key, json)| (key, metadata(json))).collect();
    let file = SafeTensors::deserialize(bytes).unwrap();
    serialize(file.tensors().into_iter().filter(|(name, _)| keep(name)), Some(header)).unwrap()
}

#[test]
fn damaged_checkpoints_are_described() {
    let mut solver = solver::<f32>(SolverOptions { epochs: 1.0, ..options() });
    to_the_end(&mut solver);
    let good = state(&solver);
    let replaced = |from: &'static str, to: &'static str| {
        rewrite(
            &good,
            |json| {
                assert!(json.contains(from), "{json}");
                json.replace(from, to)
            },
            |_| true,
        )
    };
    let without = |tensor: &'static str| rewrite(&good, |json| json, |name| name != tensor);
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("truncated", good[..good.len() - 1].to_vec(), &["cut off", "restore it"]),
        ("cut in the header", good[..100].to_vec(), &["cut off"]),
        ("longer than it says", [&good[..], &[0]].concat(), &["damaged"]),
        ("empty", Vec::new(), &["not a checkpoint", "gemmnet train"]),
        ("something else", b"\x89PNG and what follows".to_vec(), &["not a checkpoint"]),
        ("of another program", serialize([("weight", view)], None).unwrap(), &["no checkpoint of gemmnet"]),
        (
            "of the future",
            replaced("\"format\":3", "\"format\":7"),
            &["format 7", "reads formats 1 to 3", "version of gemmnet"],
        ),
        ("before the first", replaced("\"format\":3", "\"format\":0"), &["format 0", "reads formats 1 to 3"]),
        ("bad metadata", replaced("\"samples\"", "\"examples\""), &["metadata", "samples"]),
        ("a network alone", replaced("\"options\"", "\"choices\""), &["without its training"]),
        ("no batches", replaced("\"batch_size\":8", "\"batch_size\":0"), &["impossible batches"]),
        ("bad notation", replaced("conv4-bn", "conf4-bn"), &["metadata", "conf4"]),
        ("an impossible network", replaced("affine10-softmax", "pool9-softmax"), &["cannot be"]),
        ("another network", replaced("conv4", "conv5"), &["`conv1.weight`", "[4, 3, 3, 3]", "[5, 3, 3, 3]"]),
        ("more steps than memory", replaced("\"step\":3", "\"step\":3000000000000000000"), &["`history.loss`", "[3]"]),
        (
            "more weights than memory",
            replaced("affine12-bn-relu-affine10", "affine1000000-bn-relu-affine1000000"),
            &["`affine1.weight`", "[1024, 1000000]"],
        ),
        (
            "images that overflow",
            replaced("[3,32,32]", "[3000000000000,3000000000000,3000000000000]"),
            &["cannot be", "more elements than a memory holds"],
        ),
        (
            "filters that overflow",
            replaced("conv4-bn", "conv1000000-conv1000000k1000000p1000000-bn"),
            &["cannot be", "more elements than a memory holds"],
        ),
        ("another size", replaced("[3,32,32]", "[3,64,64]"), &["`affine1.weight`", "[1024, 12]", "[4096, 12]"]),
        ("another step", replaced("\"step\":3", "\"step\":4"), &["`history.loss`", "[3]", "[4]"]),
        ("a bad rule", replaced("\"beta1\":0.9", "\"beta1\":1.5"), &["impossible groups", "1.5"]),
        ("no best bias", without("affine2.bias"), &["no tensor `affine2.bias`"]),
        ("no statistics", without("latest.bn2.running_var"), &["no tensor `latest.bn2.running_var`"]),
        ("no latest weights", without("latest.conv1.weight"), &["no tensor `latest.conv1.weight`"]),
        ("no moments", without("optim.second_moment.conv1.weight"), &["no tensor `optim.second_moment.conv1.weight`"]),
        ("no mean image", without("normalizer.mean"), &["no tensor `normalizer.mean`"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, rewrite(&good, |json| json, |_| true)).unwrap();
    assert_eq!(Checkpoint::<f32>::load(&path).unwrap().step(), 3, "rewriting alone does no harm");
    for (what, bytes, parts) in cases {
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::<f32>::load(&path).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{what}: {error:?}");
        let message = error.to_string();
        for part in parts.iter().chain([&"model.safetensors: "]) {
            assert!(message.contains(part), "{what}: `{part}` is not in: {message}");
        }
        assert!(!message.contains('\n'), "{message}");
    }
    fs::write(&path, &good).unwrap();
    let error = Checkpoint::<f64>::load(&path).unwrap_err().to_string();
    assert!(error.contains("f32 numbers") && error.contains("one of f64"), "{error}");
    let missing = Checkpoint::<f32>::load(&dir.path().join("nothing")).unwrap_err().to_string();
    assert!(missing.contains("cannot read"), "{missing}");
    // The network alone needs no more than itself.
    fs::write(&path, without("latest.conv1.weight")).unwrap();
    assert_eq!(Model::<f32>::load(&path).unwrap().class_names.len(), 10);
}

#[test]
fn options_that_make_no_sense_are_errors() {
    type Change = fn(&mut SolverOptions);
    let cases: [(Change, &str); 10] = [
        (|o| o.epochs = 0.0, "0 epochs"),
        (|o| o.batch_size = 0, "batch of 0"),
        (|o| o.groups[0].l2 = f64::NAN, "NaN is not"),
        (|o| o.groups.truncate(1), "no group selects bn1.weight"),
        (|o| o.clip_norm = Some(-1.0), "-1 is not a positive number"),
        (|o| o.ema = Some(f64::NAN), "decay of NaN"),
        (|o| o.train_accuracy_samples = 0, "0 images"),
        (|o| o.print_every = 0, "0 iterations"),
        (|o| o.groups[0].rule = gemmnet::optim::UpdateRule::Momentum { momentum: 1.0 }, "momentum"),
        (|o| o.augment = Some(Augment { shift: 40, ..Augment::NONE }), "40 pixels"),
    ];
    for (change, part) in cases {
        let mut options = options();
        change(&mut options);
        let solver = Solver::<f32>::new(network(NOTATION), images(), options);
        let error = solver.and_then(|mut solver| solver.train(until(1))).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(part), "{error}");
    }
    let few = Solver::<f32>::new(network("affine4"), images(), options()).unwrap_err().to_string();
    assert!(few.contains("4 scores") && few.contains("affine10"), "{few}");
    let spec = NetworkSpec::parse("affine10").unwrap();
    let small = Network::<f32>::new(&spec, [3, 16, 16], Init::He, 0).unwrap();
    let error = Solver::new(small, images(), options()).unwrap_err();
    assert!(error.to_string().contains("3x16x16, the data's are 3x32x32"), "{error}");
}

#[test]
fn accuracy_counts_images_and_nan_as_wrong() {
    let data = images();
    let mut network = network::<f32>("affine10");
    network.params_mut().values_mut().fill(0.0);
    network.params_mut().get_mut("affine1.bias").unwrap()[[4]] = 1.0;
    // Every tenth image is of class 4; batches that do not divide the split lose none.
    for batch in [1, 3, 10, 100] {
        assert_eq!(accuracy(&mut network, &data, Split::Test, batch, Views::One).unwrap(), 0.1);
        assert_eq!(predict(&mut network, &data, Split::Train, batch, Views::One).unwrap(), [Some(4); IMAGES]);
    }
    network.params_mut().get_mut("affine1.bias").unwrap()[[7]] = f32::NAN;
    assert_eq!(accuracy(&mut network, &data, Split::Test, 10, Views::One).unwrap(), 0.0);
    assert_eq!(predict(&mut network, &data, Split::Test, 4, Views::One).unwrap(), [None; 10]);
    assert!(accuracy(&mut network, &data, Split::Test, 0, Views::One).unwrap_err().to_string().contains("batch of 0"));
}

/// CS231n's check of a whole training loop: 100 images of CIFAR-10, 20 iterations. It reaches 0.83 there.
#[test]
fn a_hundred_images_are_learnt_by_heart() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cifar10/exact-sample");
    let dir = std::env::var_os("GEMMNET_TEST_CIFAR_SAMPLE").map_or(beside, PathBuf::from);
    if !dir.is_dir() {
        eprintln!("skipped: no real records in {}; set GEMMNET_TEST_CIFAR_SAMPLE", dir.display());
        return;
    }
    let data = Dataset::open(&dir, Normalization::MeanImage).unwrap().limit(Split::Train, 100).unwrap();
    let spec = NetworkSpec::parse("conv32k7-relu-pool-affine100-relu-affine10").unwrap();
    let network = Network::<f32>::new(&spec, DIM, Init::Gaussian { std: 1e-2 }, 0).unwrap();
    let options = SolverOptions { epochs: 10.0, batch_size: 50, print_every: 1, ..SolverOptions::default() };
    let mut solver = Solver::new(network, data, options).unwrap();
    let report = to_the_end(&mut solver);
    assert_eq!(report.steps, 20);
    assert!(report.final_train_accuracy >= 0.8, "{report:?}");
    assert!(solver.history().loss[0] > 2.0, "it starts at about ln 10: {:?}", solver.history().loss);
}
