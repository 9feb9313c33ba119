//! Level 3. Depthwise convolution without a product: every filter sees one channel, so there is nothing to multiply but
//! planes by numbers.
//!
//! ```text
//! out[n, f, i, j] = sum over ki, kj of w[f, ki, kj] x[n, c, i s - p + ki d, j s - p + kj d]       c = f C / F
//! ```
//!
//! A product would have one row and `KH KW` columns: im2col moves each pixel `KH KW` times to use it once. Instead a
//! channel is copied into a plane with its padding, and `Polyphase` (see [`crate::ops::conv::im2col`]) undoes the stride.
//! Output `o` (a row times the plane's pitch plus a column) then reads element `o + shift` of a phase, with one phase and
//! shift per cell of the filter (a *tap*), no edges, and a plane is one long run of vectors. Between two rows of the run
//! lie as many elements as the largest horizontal shift: what is computed there is of no use, and is dropped.
//!
//! Backward is the adjoint. `dout` is laid out by the same pitch with zeros in the gaps, so that
//!
//! ```text
//! dw[tap] = sum over o of dout[o] phase[o + shift]        dphase[q] = sum over taps of that phase of w[tap] dout[q - shift]
//! ```

use crate::element::Element;
use crate::ops::conv::backward::{Piece, Steps, Wanted};
use crate::ops::conv::im2col::Polyphase;
use crate::ops::conv::plan::ConvPlan;
use crate::ops::conv::rows::{Outputs, PlaneRows};
use crate::parallel::piece_range;
use crate::shape::{Axis, Conv2dShape};
use crate::simd::{dot, sum, vectorized};
use crate::workspace::Workspace;

/// Taps added in one pass over a run: so many streams of pixels, and the sums are loaded and stored once.
const TOGETHER: usize = 4;

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
struct ChannelLayout {
    rows: Axis,
    cols: Axis,
    /// Of the padded plane, which ends with the last window.
    phases: Polyphase,
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

impl ChannelLayout {
    fn new(shape: &Conv2dShape) -> Self {
        let Conv2dShape { rows, cols, .. } = *shape;
        let (padded_rows, padded_cols) = (rows.filled_up(), cols.filled_up());
        let padded = (padded_rows.input, padded_cols.input);
        let corner = (rows.before.min(padded.0), cols.before.min(padded.1));
        let (phases, pitch) = (Polyphase::new(padded_rows, padded_cols), padded.1.div_ceil(cols.stride));
        ChannelLayout {
            rows,
            cols,
            phases,
            split: rows.stride > 1 || cols.stride > 1,
            padded,
            corner,
            seen: (rows.input.min(padded.0 - corner.0), cols.input.min(padded.1 - corner.1)),
            plane: phases.channel() / (phases.phases().0 * phases.phases().1),
            pitch,
            run: (rows.output - 1) * pitch + cols.output,
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

    /// Phase and shift of a cell of a filter.
    #[inline(always)]
    fn tap(&self, cell: usize) -> (usize, usize) {
        let row = cell / self.cols.window * self.rows.dilation;
        let col = cell % self.cols.window * self.cols.dilation;
        let phase = row % self.rows.stride * self.phases.phases().1 + col % self.cols.stride;
        (phase, row / self.rows.stride * self.pitch + col / self.cols.stride)
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
        self.phases.split(padded, 0..self.rows.output, phases);
        phases
    }

    /// Sets `dx` from the gradient of the phases: the adjoint of [`ChannelLayout::source`].
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

/// As [`crate::ops::conv::forward`], with whole planes for `finish`.
pub(super) fn forward<T: Element>(
    plan: &ConvPlan,
    images: usize,
    x: &[T],
    w: &[T],
    outputs: Outputs<'_, T>,
    finish: impl Fn(usize, &mut [T], &mut [T], &mut [u8]) + Sync + Send,
    ws: &mut Workspace,
) {
    let (shape, layout) = (&plan.shape, ChannelLayout::new(&plan.shape));
    let (multiplier, cells, in_plane) = (shape.filters / shape.channels, shape.column(), shape.in_plane());
    let (padded_len, phases_len) = layout.source_lens();
    let (channels, pieces) = (images * shape.channels, images * plan.channel_pieces(images));
    let (_, scratch) = ws.lend(0, padded_len + phases_len + layout.run);
    outputs.for_each_run(channels, pieces, |piece, mut planes| {
        let own = piece_range(channels, pieces, piece);
        scratch.with(|scratch: &mut [T]| {
            let (source, product) = scratch.split_at_mut(padded_len + phases_len);
            source.fill(T::zero());
            let (padded, phases) = source.split_at_mut(padded_len);
            for channel in own.clone() {
                let x = &x[channel * in_plane..][..in_plane];
                let source = vectorized!(layout.source(x, padded, phases));
                for m in 0..multiplier {
                    let filter = channel % shape.channels * multiplier + m;
                    let w = &w[filter * cells..][..cells];
                    vectorized!(layout.convolve(w, source, product));
                    let (out, cells) = planes.plane((channel - own.start) * multiplier + m);
                    finish(filter, &mut product[..shape.out_plane()], out, cells);
                }
            }
        });
    });
}

impl ChannelLayout {
    /// A plane of the output, at the beginning of `out`.
    #[inline(always)]
    fn convolve<T: Element>(&self, w: &[T], source: &[T], out: &mut [T]) {
        out.fill(T::zero());
        let taps = w.iter().enumerate().map(
            #[inline(always)]
            |(cell, &w)| {
                let (phase, shift) = self.tap(cell);
                (phase * self.plane + shift, w)
            },
        );
        add_taps(taps, source, out);
        self.close_gaps(out);
    }

    /// Lays the rows of a plane of `dout` out by the pitch. What lies between and around them is zero and stays so.
    #[inline(always)]
    fn spread<T: Element>(&self, rows: &[T], dout: &mut [T]) {
        for (to, row) in dout[self.margin()..].chunks_mut(self.pitch).zip(rows.chunks_exact(self.cols.output)) {
            to[..row.len()].copy_from_slice(row);
        }
    }

    /// `dw[tap] += sum over o of dout[o] phase[o + shift]`
    #[inline(always)]
    fn add_filter_gradient<'a, T: Element>(&self, dout: &[T], source: &[T], dw: impl Iterator<Item = &'a mut T>) {
        let run = &dout[self.margin()..][..self.run];
        for (cell, dw) in dw.enumerate() {
            let (phase, shift) = self.tap(cell);
            *dw += dot(run, &source[phase * self.plane + shift..]);
        }
    }

    /// `dphase[q] += sum over taps of that phase of w[tap] dout[q - shift]`
    #[inline(always)]
    fn add_pixel_gradient<T: Element>(&self, w: &[T], dout: &[T], dphases: &mut [T]) {
        for (phase, dphase) in dphases.chunks_exact_mut(self.plane).enumerate() {
            let taps = w.iter().enumerate().filter_map(
                #[inline(always)]
                |(cell, &w)| {
                    let (of, shift) = self.tap(cell);
                    (of == phase).then_some((self.margin() - shift, w))
                },
            );
            add_taps(taps, dout, dphase);
        }
    }
}

/// What every plane needs to know backward.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depthwise {
    shape: Conv2dShape,
    layout: ChannelLayout,
    wanted: Wanted,
}

impl Depthwise {
    pub(super) fn new(shape: &Conv2dShape, wanted: Wanted) -> Self {
        Depthwise { shape: *shape, layout: ChannelLayout::new(shape), wanted }
    }

    /// Elements of: the padded plane and its phases; `dout`, with zeros for the taps that look before the first output and
    /// past the last; the gradients of the phases and of the padded plane; a plane as it comes from the source.
    fn lens(&self) -> [usize; 6] {
        let ((padded, phases), layout) = (self.layout.source_lens(), &self.layout);
        let (dphases, dpadded) = match self.wanted.dx {
            true => (layout.phases.channel(), if layout.split { padded } else { 0 }),
            false => (0, 0),
        };
        [padded, phases, layout.margin() + layout.plane, dphases, dpadded, self.shape.out_plane()]
    }
}

impl<T: Element> Steps<T> for Depthwise {
    fn filters_len(&self) -> usize {
        self.shape.w().iter().product()
    }

    fn prepare(&self, w: &[T], filters: &mut [T]) {
        filters.copy_from_slice(w);
    }

    fn scratch_len(&self) -> usize {
        self.lens().iter().sum()
    }

    fn run(&self, mut piece: Piece<'_, T>, source: &(impl Fn(PlaneRows, &mut [T]) + Sync), scratch: &mut [T]) {
        let Depthwise { shape, layout, wanted } = self;
        let (multiplier, cells, in_plane) = (shape.filters / shape.channels, shape.column(), shape.in_plane());
        let [padded_len, phases_len, dout_len, dphases_len, dpadded_len, _] = self.lens();
        scratch.fill(T::zero());
        let (padded, scratch) = scratch.split_at_mut(padded_len);
        let (phases, scratch) = scratch.split_at_mut(phases_len);
        let (dout, scratch) = scratch.split_at_mut(dout_len);
        let (dphases, scratch) = scratch.split_at_mut(dphases_len);
        let (dpadded, rows) = scratch.split_at_mut(dpadded_len);
        piece.dw.fill(T::zero());
        piece.db.fill(T::zero());
        for (image, channel) in piece.images.clone().flat_map(|image| (0..shape.channels).map(move |c| (image, c))) {
            let x = &piece.x(image)[channel * in_plane..][..in_plane];
            let x = if wanted.dw { vectorized!(layout.source(x, padded, phases)) } else { &[] };
            dphases.fill(T::zero());
            for m in 0..multiplier {
                let filter = channel * multiplier + m;
                source(PlaneRows { image, filter, row: 0 }, rows);
                vectorized!(layout.spread(rows, dout));
                if wanted.db {
                    piece.db[filter] += vectorized!(sum(rows));
                }
                if wanted.dw {
                    // dw_g^T [K, F/G]
                    let dw = &mut piece.dw[channel * multiplier * cells..][..multiplier * cells];
                    vectorized!(layout.add_filter_gradient(dout, x, dw[m..].iter_mut().step_by(multiplier)));
                }
                if wanted.dx {
                    let w = &piece.filters[filter * cells..][..cells];
                    vectorized!(layout.add_pixel_gradient(w, dout, dphases));
                }
            }
            if wanted.dx {
                let dx = &mut piece.dx.image(image)[channel * in_plane..][..in_plane];
                vectorized!(layout.source_adjoint(dphases, dpadded, dx));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, Array4, Dimension};

    use crate::naive;
    use crate::ops::conv::tests::random;
    use crate::ops::conv::{Conv2dGrads, conv2d_backward, conv2d_forward};
    use crate::parallel::with_threads;
    use crate::shape::{Algorithm, Conv2d, Padding};

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
}
