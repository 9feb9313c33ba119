//! Checks the gradients of a layer of your own: `cargo run --release --example 02_check_a_layer`.
//!
//! The layer divides every row by its length, `out = x / |x|`, so `dx = (dout - out (out . dout)) / |x|`. A second version
//! forgets the second term, which is what a gradient check is for.

use gemmnet::gradcheck::{check, numeric_gradient_array};
use gemmnet::random::{Purpose, stream};
use ndarray::{Array2, ArrayView2, Axis};
use rand::RngExt;
use rand_distr::StandardNormal;

/// Length of every row, `(N, 1)`.
fn lengths(x: ArrayView2<f64>) -> Array2<f64> {
    x.map_axis(Axis(1), |row| row.dot(&row).sqrt()).insert_axis(Axis(1))
}

fn forward(x: ArrayView2<f64>) -> Array2<f64> {
    &x / &lengths(x)
}

fn backward(dout: ArrayView2<f64>, x: ArrayView2<f64>) -> Array2<f64> {
    let out = forward(x);
    let along = (&out * &dout).sum_axis(Axis(1)).insert_axis(Axis(1));
    (&dout - &out * &along) / &lengths(x)
}

fn wrong_backward(dout: ArrayView2<f64>, x: ArrayView2<f64>) -> Array2<f64> {
    &dout / &lengths(x)
}

fn main() {
    let mut rng = stream(0, Purpose::Example, 0, 0);
    let mut normal = || Array2::from_shape_simple_fn((4, 6), || rng.sample(StandardNormal));
    // With a random dout: with a constant one, mistakes cancel.
    let (x, dout): (Array2<f64>, Array2<f64>) = (normal(), normal());

    let numeric = numeric_gradient_array(forward, x.view(), dout.view());
    let right = check("dx", &backward(dout.view(), x.view()), &numeric);
    let wrong = check("dx without its second term", &wrong_backward(dout.view(), x.view()), &numeric);
    println!("{right}\n{wrong}");
    assert!(right.max_rel_error < 1e-7 && wrong.max_rel_error > 1e-2);
}
