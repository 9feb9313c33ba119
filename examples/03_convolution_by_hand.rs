//! One convolution in three ways: `cargo run --release --example 03_convolution_by_hand`.
//!
//! Naive loops, im2col and a matrix product, and the fast operation give the same numbers; the example then finds the edges
//! of a drawing with it.

use gemmnet::gradcheck::rel_error_norm;
use gemmnet::naive;
use gemmnet::ops::conv::conv2d_forward;
use gemmnet::ops::conv::im2col::im2col;
use gemmnet::shape::{Conv2d, Padding};
use ndarray::{Array4, array};

/// A disc with a hole, `(1, 1, side, side)`: 1 inside, 0 outside.
fn drawing(side: usize) -> Array4<f32> {
    Array4::from_shape_fn((1, 1, side, side), |(_, _, i, j)| {
        let [y, x] = [i, j].map(|p| (p as f32 + 0.5) / side as f32 - 0.5);
        if (0.15..0.42).contains(&y.hypot(x)) { 1.0 } else { 0.0 }
    })
}

fn main() -> gemmnet::Result<()> {
    let side = 24;
    let x = drawing(side);
    // Sobel's filters (2, 1, 3, 3): how fast brightness changes downwards, and to the right.
    let w: Array4<f32> = array![
        [[[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]],
        [[[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]]
    ];
    let conv = Conv2d { padding: Padding::Same, ..Conv2d::default() };

    let naive = naive::conv2d_forward(x.view(), w.view(), None, &conv)?;

    // The columns are (C KH KW, N H' W'); the filters as a matrix (F, C KH KW) times them are (F, N H' W').
    let columns = im2col(x.view(), (3, 3), &conv)?;
    let filters = w.to_shape((2, 9)).expect("2 filters of 9 weights");
    let by_hand = filters.dot(&columns).into_shape_with_order((2, 1, side, side)).expect("one image");
    let by_hand = by_hand.permuted_axes([1, 0, 2, 3]);

    let fast = conv2d_forward(x.view(), w.view(), None, &conv)?;
    println!(
        "differences: im2col {:.1e}, fast {:.1e}",
        rel_error_norm(&naive, &by_hand),
        rel_error_norm(&naive, &fast)
    );

    for i in 0..side {
        let line = (0..side).map(|j| {
            let strength = fast[[0, 0, i, j]].hypot(fast[[0, 1, i, j]]);
            [' ', '.', 'o', '#'][(strength as usize).min(3)]
        });
        println!("{}", line.collect::<String>());
    }
    Ok(())
}
