//! Trains a network on images in memory, measures it, and saves it: `cargo run --release --example 01_train_on_arrays`.
//!
//! The images are drawn here: a bright disc, a ring or a cross on a noisy ground. With CIFAR-10's files in a folder,
//! `Dataset::open` takes the place of `Dataset::from_arrays`, and the rest stays.

use std::ops::ControlFlow;

use gemmnet::data::{Dataset, Normalization, Split, Views};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::optim::{Group, LearningRate};
use gemmnet::random::{Purpose, stream};
use gemmnet::train::{Event, Model, Solver, SolverOptions, accuracy};
use ndarray::Array4;
use rand::RngExt;

/// `count` images `(count, 3, 32, 32)` and their labels: 0 disc, 1 ring, 2 cross.
fn draw(count: usize, seed: u64) -> (Array4<u8>, Vec<u8>) {
    let mut rng = stream(seed, Purpose::Example, 0, 0);
    let mut images = Array4::zeros((count, 3, 32, 32));
    let labels: Vec<u8> = (0..count).map(|i| (i % 3) as u8).collect();
    for (mut image, &label) in images.outer_iter_mut().zip(&labels) {
        let (row, column): (f32, f32) = (rng.random_range(10.0..22.0), rng.random_range(10.0..22.0));
        let size = rng.random_range(5.0..9.0);
        for ((_, i, j), pixel) in image.indexed_iter_mut() {
            let (y, x) = (i as f32 - row, j as f32 - column);
            let inside = match label {
                0 => y.hypot(x) < size,
                1 => (y.hypot(x) - size).abs() < 1.5,
                _ => y.abs().min(x.abs()) < 1.5 && y.abs().max(x.abs()) < size,
            };
            *pixel = rng.random_range(0..100) + if inside { 100 } else { 0 };
        }
    }
    (images, labels)
}

fn main() -> gemmnet::Result<()> {
    let [train, validation, test] = [(600, 1), (150, 2), (300, 3)].map(|(count, seed)| draw(count, seed));
    let data = Dataset::from_arrays(
        (train.0.view(), &train.1),
        (validation.0.view(), &validation.1),
        (test.0.view(), &test.1),
        Normalization::MeanImage,
    )?;

    let spec = NetworkSpec::parse("[conv8-bn-relu-pool]x2-affine3")?;
    let network = Network::<f32>::new(&spec, data.dim(), Init::He, 0)?;
    for block in network.summary() {
        println!("{:20} output {:?}, {} parameters", block.name, block.output, block.parameters);
    }

    let options = SolverOptions {
        epochs: 5.0,
        batch_size: 50,
        groups: Group::classic("adam".parse()?, LearningRate::constant(2e-3)?, 0.0),
        verbose: false,
        ..SolverOptions::default()
    };
    let mut solver = Solver::new(network, data.clone(), options)?;
    let report = solver.train(|event| {
        if let Event::Epoch { epoch, val_accuracy, .. } = event {
            println!("epoch {epoch}: validation accuracy {val_accuracy:.3}");
        }
        ControlFlow::Continue(())
    })?;
    println!("kept: {:.3} after epoch {}", report.kept_val_accuracy, report.kept_epoch);

    let path = std::env::temp_dir().join("gemmnet-example.safetensors");
    solver.checkpoint().save(&path)?;
    let mut trained = Model::<f32>::load(&path)?;
    let test = accuracy(&mut trained.network, &data, Split::Test, 100, Views::One)?;
    println!("on the test images, read again from {}: {test:.3}", path.display());
    Ok(())
}
