//! Level 2. Depthwise convolution without a product: every filter sees one channel, so there is nothing to multiply but
//! planes by numbers.
//!
//! ```text
//! out[n, f, i, j] = sum over ki, kj of w[f, ki, kj] x[n, c, i s - p + ki d, j s - p + kj d]       c = f C / F
//! ```
//!
//! A product would have one row and `KH KW` columns: im2col moves each pixel `KH KW` times to use it once. Instead a
//! channel is copied into a plane with its padding, and `Phases` (see [`crate::ops::im2col`]) undo the stride. Output `o` (a row times the plane's
//! pitch plus a column) then reads element `o + shift` of a phase, with one phase and shift per cell of the filter (a
//! *tap*), no edges, and a plane is one long run of vectors. Between two rows of the run lie as many elements as the
//! largest horizontal shift: what is computed there is of no use, and is dropped.
//!
//! Backward is the adjoint. `dout` is laid out by the same pitch with zeros in the gaps, so that
//!
//! ```text
//! dw[tap] = sum over o of dout[o] phase[o + shift]        dphase[q] = sum over taps of that phase of w[tap] dout[q - shift]
//! ```

use crate::element::Element;
use crate::ops::conv::PlaneRows;
use crate::ops::im2col::Phases;
use crate::ops::slots::Slots;
use crate::parallel::{Disjoint, for_each_piece, piece_range};
use crate::shape::{Axis, Conv2dShape};
use crate::simd::{dot, sum, vectorized};
use crate::workspace::Workspace;

/// Taps added in one pass over a run: so many streams of pixels, and the sums are loaded and stored once.
const TOGETHER: usize = 4;

// Closures for `vectorized` are `inline(always)` here: it calls them from one place per kind of processor, and what is too
// large to be inlined into each of them would be compiled once, for the oldest.

/// `run[o] += sum of w from[o + offset]` over taps `(offset, w)`, in their order.
#[inline(always)]
fn add_taps<T: Element>(mut taps: impl Iterator<Item = (usize, T)>, from: &[T], run: &mut [T]) {
    loop {
        let (mut some, mut count) = ([(0, T::zero()); TOGETHER], 0);
        for (place, tap) in some.iter_mut().zip(taps.by_ref()) {
            *place = tap;
            count += 1;
        }
        if count < TOGETHER {
            some[..count].iter().for_each(
                #[inline(always)]
                |&tap| add_some([tap], from, run),
            );
            return;
        }
        add_some(some, from, run);
    }
}

/// [`add_taps`] of `K` of them.
#[inline(always)]
fn add_some<T: Element, const K: usize>(taps: [(usize, T); K], from: &[T], run: &mut [T]) {
    let from = taps.map(
        #[inline(always)]
        |(offset, _)| &from[offset..][..run.len()],
    );
    for (o, sum) in run.iter_mut().enumerate() {
        let mut total = *sum;
        for k in 0..K {
            total += taps[k].1 * from[k][o];
        }
        *sum = total;
    }
}

/// Where the pixels of one channel lie.
#[derive(Clone, Copy, Debug)]
struct Plan {
    rows: Axis,
    cols: Axis,
    /// Of the padded plane, which ends with the last window.
    phases: Phases,
    /// Whether there is a stride to undo.
    split: bool,
    /// Rows and columns of the padded plane.
    padded: (usize, usize),
    /// Row and column of the padded plane where the image begins, and how much of it some window may see.
    corner: (usize, usize),
    seen: (usize, usize),
    /// Elements of one phase, and from one of its rows to the next.
    plane: usize,
    pitch: usize,
    /// Elements from the first output of a plane to its last.
    run: usize,
}

impl Plan {
    fn new(shape: &Conv2dShape) -> Self {
        let reach = |axis: Axis| (axis.output - 1) * axis.stride + (axis.window - 1) * axis.dilation + 1;
        let filled_up = |axis: Axis| Axis { input: reach(axis), before: 0, after: 0, ..axis };
        let padded = Conv2dShape { rows: filled_up(shape.rows), cols: filled_up(shape.cols), ..*shape };
        let corner = |axis: Axis| axis.before.min(reach(axis));
        let seen = |axis: Axis| axis.input.min(reach(axis) - corner(axis));
        let (phases, pitch) = (Phases::new(&padded), padded.cols.input.div_ceil(padded.cols.stride));
        Plan {
            rows: shape.rows,
            cols: shape.cols,
            phases,
            split: !Phases::is_image(shape),
            padded: (padded.rows.input, padded.cols.input),
            corner: (corner(shape.rows), corner(shape.cols)),
            seen: (seen(shape.rows), seen(shape.cols)),
            plane: phases.channel() / (shape.rows.stride * shape.cols.stride),
            pitch,
            run: (shape.rows.output - 1) * pitch + shape.cols.output,
        }
    }

    /// Elements of the padded plane, and of its phases if they are not the same.
    fn source_lens(&self) -> (usize, usize) {
        (self.padded.0 * self.padded.1, if self.split { self.phases.channel() } else { 0 })
    }

    /// The largest shift of a tap.
    fn margin(&self) -> usize {
        self.plane - self.run
    }

    /// Phase, shift and weight of every cell of a filter.
    #[inline(always)]
    fn taps<'a, T: Element>(&'a self, w: &'a [T]) -> impl Iterator<Item = (usize, usize, T)> + 'a {
        w.iter().enumerate().map(
            #[inline(always)]
            |(cell, &w)| {
                let row = cell / self.cols.window * self.rows.dilation;
                let col = cell % self.cols.window * self.cols.dilation;
                let phase = row % self.rows.stride * self.cols.stride + col % self.cols.stride;
                (phase, row / self.rows.stride * self.pitch + col / self.cols.stride, w)
            },
        )
    }

    /// The phases of a channel `x`. The padding in `padded` is zero and stays so.
    #[inline(always)]
    fn source<'a, T: Element>(&self, x: &[T], padded: &'a mut [T], phases: &'a mut [T]) -> &'a [T] {
        let (width, cols) = (self.cols.input, self.corner.1..self.corner.1 + self.seen.1);
        let rows = padded.chunks_exact_mut(self.padded.1).skip(self.corner.0).take(self.seen.0);
        for (row, x) in rows.zip(x.chunks_exact(width)) {
            row[cols.clone()].copy_from_slice(&x[..self.seen.1]);
        }
        if !self.split {
            return padded;
        }
        self.phases.split(padded, phases);
        phases
    }

    /// Sets `dx` from the gradient of the phases: the adjoint of [`Plan::source`].
    #[inline(always)]
    fn source_adjoint<T: Element>(&self, dphases: &[T], dpadded: &mut [T], dx: &mut [T]) {
        let dpadded = if self.split {
            self.phases.merge(dphases, dpadded);
            dpadded
        } else {
            dphases
        };
        let (seen, rest) = dx.split_at_mut(self.seen.0 * self.cols.input);
        let rows = dpadded.chunks_exact(self.padded.1).skip(self.corner.0);
        for (dx, row) in seen.chunks_exact_mut(self.cols.input).zip(rows) {
            let (seen, rest) = dx.split_at_mut(self.seen.1);
            seen.copy_from_slice(&row[self.corner.1..][..seen.len()]);
            rest.fill(T::zero());
        }
        rest.fill(T::zero());
    }

    /// Moves the rows of an output plane together.
    #[inline(always)]
    fn close_gaps<T: Element>(&self, out: &mut [T]) {
        let width = self.cols.output;
        for i in 1..self.rows.output {
            out.copy_within(i * self.pitch..i * self.pitch + width, i * width);
        }
    }
}

/// As [`crate::ops::conv::forward`], whose sink gets whole planes here.
pub(crate) fn forward<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    ws: &mut Workspace,
    sink: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
) {
    let (plan, multiplier, cells) = (Plan::new(shape), shape.filters / shape.channels, shape.column());
    let (padded_len, phases_len) = plan.source_lens();
    // Few images: parts of their channels are the pieces, so that a single image is spread over the threads too.
    let pieces_per_image = if shape.images < 16 { shape.channels.min(16) } else { 1 };
    let (_, scratch) = ws.lend(0, padded_len + phases_len + plan.run);
    for_each_piece(shape.images * pieces_per_image, |piece| {
        let image = piece / pieces_per_image;
        scratch.with(|scratch: &mut [T]| {
            let (source, out) = scratch.split_at_mut(padded_len + phases_len);
            source.fill(T::zero());
            let (padded, phases) = source.split_at_mut(padded_len);
            for c in piece_range(shape.channels, pieces_per_image, piece % pieces_per_image) {
                let x = &x[(image * shape.channels + c) * shape.in_plane()..][..shape.in_plane()];
                let source = vectorized!(plan.source(x, padded, phases),);
                for filter in c * multiplier..(c + 1) * multiplier {
                    let w = &w[filter * cells..][..cells];
                    vectorized!({
                        out.fill(T::zero());
                        let taps = plan.taps(w).map(|(phase, shift, w)| (phase * plan.plane + shift, w));
                        add_taps(taps, source, out);
                        plan.close_gaps(out);
                    },);
                    sink(PlaneRows { image, filter, row: 0 }, &mut out[..shape.out_plane()]);
                }
            }
        });
    });
}

/// As [`crate::ops::conv::backward`], whose source is asked for whole planes here.
pub(crate) fn backward<T: Element>(
    shape: &Conv2dShape,
    x: &[T],
    w: &[T],
    source: impl Fn(PlaneRows, &mut [T]) + Sync + Send,
    dx: Option<&mut [T]>,
    dw: &mut [T],
    db: Option<&mut [T]>,
    ws: &mut Workspace,
) {
    let (plan, multiplier, cells) = (Plan::new(shape), shape.filters / shape.channels, shape.column());
    let (channels, filters, in_plane) = (shape.channels, shape.filters, shape.in_plane());
    let (padded_len, phases_len) = plan.source_lens();
    // `dout` between zeros for the taps that look before the first output and past the last
    let dout_len = plan.margin() + plan.plane;
    let dphases_len = if dx.is_some() { plan.phases.channel() } else { 0 };
    let dpadded_len = if dx.is_some() && plan.split { padded_len } else { 0 };
    let scratch_len = padded_len + phases_len + dout_len + dphases_len + dpadded_len + shape.out_plane();
    let slots = Slots::new::<T>(shape.images, filters * (cells + 1));
    let dx = dx.map(|dx| Disjoint::new(&mut dx[..shape.images * channels * in_plane]));
    let (slot_data, scratch) = ws.lend(slots.len(), scratch_len);
    {
        let sums = slots.sum(slot_data, |images, sums| {
            sums.fill(T::zero());
            let (dw, db) = sums.split_at_mut(filters * cells);
            scratch.with(|scratch: &mut [T]| {
                scratch.fill(T::zero());
                let (padded, scratch) = scratch.split_at_mut(padded_len);
                let (phases, scratch) = scratch.split_at_mut(phases_len);
                let (dout, scratch) = scratch.split_at_mut(dout_len);
                let (dphases, scratch) = scratch.split_at_mut(dphases_len);
                let (dpadded, rows) = scratch.split_at_mut(dpadded_len);
                for (image, c) in images.flat_map(|image| (0..channels).map(move |c| (image, c))) {
                    let start = (image * channels + c) * in_plane;
                    let x = vectorized!(plan.source(&x[start..][..in_plane], padded, phases),);
                    dphases.fill(T::zero());
                    for filter in c * multiplier..(c + 1) * multiplier {
                        source(PlaneRows { image, filter, row: 0 }, rows);
                        let (w, dw) = (&w[filter * cells..][..cells], &mut dw[filter * cells..][..cells]);
                        vectorized!({
                            db[filter] += sum(rows);
                            let spread = dout[plan.margin()..].chunks_mut(plan.pitch);
                            for (to, row) in spread.zip(rows.chunks_exact(shape.cols.output)) {
                                to[..row.len()].copy_from_slice(row);
                            }
                            // dw[tap] = sum over o of dout[o] phase[o + shift]
                            let run = &dout[plan.margin()..][..plan.run];
                            for ((phase, shift, _), dw) in plan.taps(w).zip(dw) {
                                *dw += dot(run, &x[phase * plan.plane + shift..]);
                            }
                            if dx.is_none() {
                                return;
                            }
                            // dphase[q] = sum over taps of that phase of w[tap] dout[q - shift]
                            for (phase, dphase) in dphases.chunks_exact_mut(plan.plane).enumerate() {
                                let taps = plan.taps(w).filter(|tap| tap.0 == phase);
                                add_taps(taps.map(|(_, shift, w)| (plan.margin() - shift, w)), dout, dphase);
                            }
                        },);
                    }
                    if let Some(dx) = &dx {
                        // SAFETY: the image belongs to this slot alone.
                        let dx = unsafe { dx.slice(start, in_plane) };
                        vectorized!(plan.source_adjoint(dphases, dpadded, dx),);
                    }
                }
            });
        });
        let (dw_sums, db_sums) = sums[..filters * (cells + 1)].split_at(filters * cells);
        dw.copy_from_slice(dw_sums);
        if let Some(db) = db {
            db.copy_from_slice(db_sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, Array4, Dimension};
    use rand::RngExt;

    use crate::naive;
    use crate::ops::conv::Conv2dGrads;
    use crate::ops::conv::{conv2d_backward, conv2d_forward};
    use crate::parallel::with_threads;
    use crate::random::{Purpose, stream};
    use crate::shape::{Algorithm, Conv2d, Padding};

    fn random(shape: [usize; 4], seed: u64) -> Array4<f64> {
        let mut rng = stream(seed, Purpose::Example, 0, 0);
        Array4::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
    }

    /// Why it stands here, x, kernel, filters per channel, convolution.
    type Case = (&'static str, [usize; 4], (usize, usize), usize, Conv2d);

    fn cases() -> Vec<Case> {
        let plain = Conv2d::default();
        let same = Conv2d { padding: Padding::Same, ..plain };
        let stride = |stride, conv| Conv2d { stride, ..conv };
        let dilation = |dilation, conv| Conv2d { dilation, ..conv };
        let pad = |pad| Conv2d { padding: Padding::All(pad), ..plain };
        let sides = |top, bottom, left, right| Padding::Sides { top, bottom, left, right };
        vec![
            ("the usual one", [2, 3, 8, 8], (3, 3), 1, same),
            ("one of everything", [1, 1, 1, 1], (1, 1), 1, plain),
            ("one channel is one group", [2, 1, 6, 7], (3, 3), 3, same),
            ("two filters a channel", [3, 5, 9, 9], (3, 3), 2, same),
            ("taps that leave no remainder", [2, 2, 6, 6], (2, 2), 1, same),
            ("a large filter", [2, 2, 12, 11], (9, 9), 1, same),
            ("even and oblong filters", [2, 2, 5, 9], (2, 5), 2, same),
            ("asymmetric padding", [2, 2, 7, 5], (3, 3), 1, Conv2d { padding: sides(0, 2, 3, 1), ..plain }),
            ("more padding than filter", [1, 2, 2, 3], (2, 2), 1, pad(3)),
            ("stride 2, odd size", [2, 3, 9, 7], (3, 3), 2, stride((2, 2), same)),
            ("stride 2, even size, padding 1", [2, 2, 8, 8], (3, 3), 1, stride((2, 2), pad(1))),
            ("strides that differ", [2, 2, 9, 11], (3, 4), 1, stride((1, 3), pad(2))),
            ("a stride beyond the filter", [2, 2, 11, 10], (2, 2), 2, stride((4, 4), plain)),
            ("a stride beyond the input", [2, 2, 3, 4], (3, 3), 1, stride((9, 9), plain)),
            ("a row and a column that no window sees", [2, 2, 8, 10], (3, 3), 1, stride((2, 2), plain)),
            ("the first window in the padding alone", [1, 2, 4, 4], (2, 2), 1, stride((9, 9), pad(5))),
            ("dilation", [2, 2, 9, 11], (3, 3), 2, dilation((2, 3), same)),
            ("dilation over the edges", [1, 2, 6, 6], (3, 3), 1, dilation((4, 5), pad(5))),
            ("stride and dilation, coprime", [2, 2, 13, 14], (3, 3), 1, stride((3, 2), dilation((2, 3), pad(2)))),
            ("phases without a tap", [2, 2, 13, 14], (3, 3), 1, stride((2, 2), dilation((2, 2), pad(2)))),
            ("images that the slots share unevenly", [35, 2, 4, 5], (3, 3), 1, same),
            ("no image", [0, 2, 4, 5], (3, 3), 1, same),
        ]
    }

    /// Output and gradients of the fast twin.
    fn fast(conv: &Conv2d, x: &Array4<f64>, w: &Array4<f64>, dout: &Array4<f64>) -> (Array4<f64>, Conv2dGrads<f64>) {
        let out = conv2d_forward(x.view(), w.view(), None, conv).unwrap();
        (out, conv2d_backward(dout.view(), x.view(), w.view(), conv).unwrap())
    }

    fn bits((out, Conv2dGrads { dx, dw, db }): &(Array4<f64>, Conv2dGrads<f64>)) -> Vec<u64> {
        out.iter().chain(dx).chain(dw).chain(db).map(|value| value.to_bits()).collect()
    }

    #[track_caller]
    fn assert_close<D: Dimension>(got: &Array<f64, D>, want: &Array<f64, D>, what: &str) {
        assert_eq!(got.shape(), want.shape(), "{what}");
        for (&got, &want) in got.iter().zip(want) {
            assert!((got - want).abs() <= 1e-12 * (1.0 + want.abs()), "{what}: {got}, not {want}");
        }
    }

    /// The formula, at every thread count to the bit.
    #[test]
    fn it_is_the_convolution_and_its_gradient() {
        for (why, x, kernel, multiplier, conv) in cases() {
            let conv = Conv2d { groups: x[1], algorithm: Algorithm::Depthwise, ..conv };
            let (x, w) = (random(x, 0), random([x[1] * multiplier, 1, kernel.0, kernel.1], 1));
            let want = naive::conv2d_forward(x.view(), w.view(), None, &conv).unwrap();
            let dout = random(want.dim().into(), 2);
            let want_grads = naive::conv2d_backward(dout.view(), x.view(), w.view(), &conv).unwrap();
            let once = with_threads(1, || fast(&conv, &x, &w, &dout)).unwrap();
            let (out, grads) = &once;
            assert_close(out, &want, &format!("{why}: out"));
            assert_close(&grads.dx, &want_grads.dx, &format!("{why}: dx"));
            assert_close(&grads.dw, &want_grads.dw, &format!("{why}: dw"));
            assert_close(&grads.db, &want_grads.db, &format!("{why}: db"));
            for threads in [2, 5] {
                let again = with_threads(threads, || fast(&conv, &x, &w, &dout)).unwrap();
                assert_eq!(bits(&again), bits(&once), "{why} at {threads} threads");
            }
        }
    }

    /// Scratch holds what the last operation left there; what is not asked for does not change the rest.
    #[test]
    fn what_lies_in_memory_does_not_matter() {
        use super::*;

        let conv = Conv2d { groups: 3, stride: (2, 2), padding: Padding::Same, ..Conv2d::default() };
        let (x, w) = (random([2, 3, 7, 7], 0), random([6, 1, 3, 3], 1));
        let dout = random([2, 6, 4, 4], 2);
        let (out, grads) = fast(&conv, &x, &w, &dout);
        let shape = Conv2dShape::new([2, 3, 7, 7], [6, 1, 3, 3], &conv).unwrap();
        let mut ws = Workspace::new();
        let dirty = |ws: &mut Workspace| {
            let (shared, scratch) = ws.lend(1 << 12, 1 << 12);
            shared.fill(f64::NAN);
            scratch.with(|scratch: &mut [f64]| scratch.fill(f64::NAN));
        };
        let (x, w, dout) = (x.as_slice().unwrap(), w.as_slice().unwrap(), dout.as_slice().unwrap());
        let at = |at: PlaneRows| (at.image * shape.filters + at.filter) * shape.out_plane();
        with_threads(1, || {
            dirty(&mut ws);
            forward(&shape, x, w, &mut ws, |rows, plane| {
                assert!(*plane == out.as_slice().unwrap()[at(rows)..][..plane.len()], "{rows:?}");
            });
            let source = |rows, plane: &mut [f64]| plane.copy_from_slice(&dout[at(rows)..][..plane.len()]);
            let (mut dx, mut dw) = (vec![f64::NAN; x.len()], vec![f64::NAN; w.len()]);
            dirty(&mut ws);
            backward(&shape, x, w, source, Some(&mut dx), &mut dw, None, &mut ws);
            assert!(dx == grads.dx.as_slice().unwrap() && dw == grads.dw.as_slice().unwrap(), "dx and dw");
            dw.fill(f64::NAN);
            dirty(&mut ws);
            backward(&shape, x, w, source, None, &mut dw, None, &mut ws);
            assert!(dw == grads.dw.as_slice().unwrap(), "dw without dx");
        })
        .unwrap();
    }
}
