//! Level 3. What all algorithms of the convolution promise.

use std::ops::Range;

use ndarray::{Array1, Array4, Axis, s};
use rand::RngExt;

use super::*;
use crate::ops::layout::{Formats, MemoryFormat};
use crate::parallel::with_threads;
use crate::random::{Purpose, stream};
use crate::shape::Padding;
use crate::simd::LANES;

pub(super) fn random<T: Element>(shape: [usize; 4], seed: u64) -> Array4<T> {
    let mut rng = stream(seed, Purpose::Example, 0, 0);
    Array4::from_shape_simple_fn(shape, || T::of(rng.sample(rand_distr::StandardNormal)))
}

/// A convolution and its data.
pub(super) struct Case<T> {
    pub(super) plan: ConvPlan,
    pub(super) x: Array4<T>,
    pub(super) w: Array4<T>,
    pub(super) dout: Array4<T>,
}

/// A workspace that holds what no result may depend on.
fn poisoned<T: Element>() -> Workspace {
    let mut ws = Workspace::new();
    let (shared, scratch) = ws.lend(1 << 22, 1 << 22);
    shared.fill(T::nan());
    rayon::broadcast(|_| scratch.with(|scratch: &mut [T]| scratch.fill(T::nan())));
    ws
}

impl<T: Element> Case<T> {
    fn new(x: [usize; 4], w: [usize; 4], conv: Conv2d) -> Self {
        let shape = Conv2dShape::new(x, w, &conv).unwrap();
        let plan = ConvPlan::new::<T>(&shape).unwrap();
        Case { plan, x: random(x, 0), w: random(w, 1), dout: random(shape.out(), 2) }
    }

    fn images(&self, images: Range<usize>) -> [Array4<T>; 2] {
        [&self.x, &self.dout].map(|of| of.slice_axis(Axis(0), images.clone().into()).to_owned())
    }

    /// The output of some images by themselves.
    pub(super) fn forward(&self, images: Range<usize>) -> Array4<T> {
        let ([x, _], shape) = (self.images(images.clone()), self.plan.shape.with_images(images.len()));
        let mut out = Array4::from_elem(shape.out(), T::nan());
        let (x, w, out_slice) = (x.as_slice().unwrap(), self.w.as_slice().unwrap(), out.as_slice_mut().unwrap());
        conv2d_forward_into(&self.plan, images.len(), x, Filters::Plain(w), None, out_slice, &mut poisoned::<T>());
        out
    }

    /// The gradients over some images by themselves.
    pub(super) fn backward(&self, images: Range<usize>) -> Conv2dGrads<T> {
        let shape = self.plan.shape.with_images(images.len());
        let mut grads = Conv2dGrads {
            dx: Array4::from_elem(shape.x(), T::nan()),
            dw: Array4::from_elem(shape.w(), T::nan()),
            db: Array1::from_elem(shape.filters, T::nan()),
        };
        self.backward_into(images, [true; 3], &mut grads);
        grads
    }

    /// Those gradients of dx, dw, db that are wanted.
    fn backward_into(&self, images: Range<usize>, wanted: [bool; 3], grads: &mut Conv2dGrads<T>) {
        let [x, dout] = self.images(images.clone());
        let Conv2dGrads { dx, dw, db } = grads;
        let grads = ConvGradsMut {
            dx: dx.as_slice_mut().filter(|_| wanted[0]),
            dw: dw.as_slice_mut().filter(|_| wanted[1]),
            db: db.as_slice_mut().filter(|_| wanted[2]),
        };
        let input = ConvInput { images: images.len(), x: x.as_slice().unwrap(), w: self.w.as_slice().unwrap() };
        conv2d_backward_into(&self.plan, dout.as_slice().unwrap(), input, grads, &mut poisoned::<T>());
    }
}

fn conv(algorithm: Algorithm) -> Conv2d {
    Conv2d { padding: Padding::Same, algorithm, ..Conv2d::default() }
}

/// Why it stands here, and what is computed.
fn cases() -> Vec<(&'static str, Case<f32>)> {
    let (im2col, winograd) = (conv(Algorithm::Im2col), conv(Algorithm::Winograd));
    let strided = Conv2d { stride: (2, 2), ..im2col };
    let case = |why, x: [usize; 3], w, conv| (why, Case::new([40, x[0], x[1], x[2]], w, conv));
    vec![
        ("im2col", [5, 9, 7], [6, 5, 3, 3], im2col),
        ("im2col, several tiles", [64, 40, 24], [8, 64, 3, 3], im2col),
        ("im2col, stride and groups", [8, 11, 9], [12, 4, 3, 3], Conv2d { groups: 2, ..strided }),
        ("im2col, stride and several tiles", [48, 64, 48], [8, 48, 3, 3], strided),
        ("im2col, few pixels of many channels", [72, 5, 5], [96, 72, 3, 3], im2col),
        ("im2col, few pixels, groups", [70, 9, 9], [96, 35, 3, 3], Conv2d { groups: 2, ..strided }),
        ("im2col, few pixels in two tiles", [325, 10, 10], [104, 325, 3, 3], im2col),
        ("im2col, few pixels and channels of many filters", [9, 4, 4], [96, 9, 3, 3], strided),
        ("im2col, rows as long as vectors", [6, 9, 32], [25, 6, 3, 3], im2col),
        ("im2col, rows as long as vectors, groups", [8, 31, 31], [42, 4, 3, 5], Conv2d { groups: 2, ..strided }),
        ("pointwise", [20, 6, 5], [17, 20, 1, 1], im2col),
        ("pointwise, more terms", [70, 6, 5], [40, 70, 1, 1], im2col),
        ("pointwise with a stride", [34, 11, 9], [21, 34, 1, 1], strided),
        ("depthwise", [7, 9, 9], [14, 1, 3, 3], Conv2d { groups: 7, ..conv(Algorithm::Depthwise) }),
        ("Winograd, one tile per image", [18, 4, 3], [35, 18, 3, 3], winograd),
        ("Winograd, small tiles", [17, 3, 2], [18, 17, 3, 3], winograd),
        ("Winograd, a short tile alone", [17, 1, 5], [18, 17, 3, 3], winograd),
        ("Winograd, long and short tiles", [20, 7, 6], [18, 20, 3, 3], winograd),
        ("Winograd, a group to a slot", [64, 8, 8], [48, 64, 3, 3], winograd),
        ("Winograd, sums longer than are cut", [530, 7, 5], [300, 530, 3, 3], winograd),
        ("Winograd, several groups to a slot", [16, 36, 32], [20, 16, 3, 3], winograd),
        ("Winograd, several groups of long and short tiles to a slot", [34, 27, 26], [48, 34, 3, 3], winograd),
        ("Winograd, several groups of short tiles to a slot", [16, 1, 268], [16, 16, 3, 3], winograd),
        ("Winograd, more tiles than two groups have", [16, 66, 72], [16, 16, 3, 3], winograd),
    ]
    .into_iter()
    .map(|(why, x, w, conv)| case(why, x, w, conv))
    .collect()
}

#[track_caller]
fn assert_bits<'a>(got: impl IntoIterator<Item = &'a f32>, want: impl IntoIterator<Item = &'a f32>, what: &str) {
    let bits = |values: &f32| values.to_bits();
    assert!(got.into_iter().map(bits).eq(want.into_iter().map(bits)), "{what}: other bits");
}

/// The output and dx of an image are the same alone and in every batch; with OpenBLAS' AVX2 kernels but for rounding.
#[test]
fn an_image_has_the_same_bits_in_every_batch() {
    let assert_bits = |got: &Array4<f32>, want: &Array4<f32>, what: &str| match crate::blas::setup().rows_alike {
        true => assert_bits(got, want, what),
        false => {
            let largest = want.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-4 * largest), "{what}");
        }
    };
    for (why, case) in cases() {
        let (out, dx) = (case.forward(0..40), case.backward(0..40).dx);
        for images in [0..1, 3..4, 0..2, 1..4, 0..7, 0..16, 9..40] {
            let what = |of| format!("{why}: {of} of images {images:?}");
            let part = |of: &Array4<f32>| of.slice_axis(Axis(0), images.clone().into()).to_owned();
            assert_bits(&case.forward(images.clone()), &part(&out), &what("out"));
            assert_bits(&case.backward(images.clone()).dx, &part(&dx), &what("dx"));
        }
    }
}

/// A batch cut where slots meet has the gradients of the whole, added up by the tree.
#[test]
fn gradients_of_halves_add_up_to_those_of_the_whole() {
    for (why, case) in cases() {
        let slots = |images| case.plan.slots(images).count();
        // Small planes have so few slots that halves do not have half as many.
        let halved = [32, 16, 8, 4, 2].into_iter().filter(|&images| slots(images) == 2 * slots(images / 2));
        let halved: Vec<usize> = halved.collect();
        assert!(halved.ends_with(&[4, 2]), "{why}: {halved:?}");
        for images in halved {
            let whole = case.backward(0..images);
            let (first, second) = (case.backward(0..images / 2), case.backward(images / 2..images));
            assert_bits(&(&first.dw + &second.dw), &whole.dw, &format!("{why}: dw of {images} images"));
            assert_bits(&(&first.db + &second.db), &whole.db, &format!("{why}: db of {images} images"));
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for (why, case) in cases() {
        let run = |threads| with_threads(threads, || (case.forward(0..37), case.backward(0..37))).unwrap();
        let (want, want_grads) = run(1);
        for images in 1..4 {
            let out = with_threads(5, || case.forward(0..images)).unwrap();
            assert_bits(
                &out,
                &want.slice_axis(Axis(0), (0..images).into()).to_owned(),
                &format!("{why}: {images} images"),
            );
        }
        for threads in [2, 5] {
            let (out, grads) = run(threads);
            assert_bits(&out, &want, &format!("{why}: out with {threads} threads"));
            assert_bits(&grads.dx, &want_grads.dx, &format!("{why}: dx with {threads} threads"));
            assert_bits(&grads.dw, &want_grads.dw, &format!("{why}: dw with {threads} threads"));
            assert_bits(&grads.db, &want_grads.db, &format!("{why}: db with {threads} threads"));
        }
    }
}

/// What is not asked for is not touched, and what is has the same bits.
#[test]
fn gradients_that_nobody_asks_for_change_nothing() {
    for (why, case) in cases() {
        let want = case.backward(0..5);
        for wanted in
            [[false; 3], [true, false, false], [false, true, false], [false, false, true], [true, false, true]]
        {
            let filled = |dim| Array4::from_elem(dim, 7.0);
            let mut grads = Conv2dGrads {
                dx: filled(want.dx.raw_dim()),
                dw: filled(want.dw.raw_dim()),
                db: Array1::from_elem(want.db.len(), 7.0),
            };
            let untouched = grads.clone();
            case.backward_into(0..5, wanted, &mut grads);
            let [dx, dw, db] = wanted.map(|wanted| if wanted { &want } else { &untouched });
            assert_bits(&grads.dx, &dx.dx, &format!("{why}: dx, wanted {wanted:?}"));
            assert_bits(&grads.dw, &dw.dw, &format!("{why}: dw, wanted {wanted:?}"));
            assert_bits(&grads.db, &db.db, &format!("{why}: db, wanted {wanted:?}"));
        }
    }
}

#[test]
fn no_images_have_no_output_and_gradients_of_zero() {
    for (why, case) in cases() {
        assert!(case.forward(0..0).is_empty(), "{why}");
        let grads = case.backward(0..0);
        assert!(grads.dw.iter().chain(&grads.db).all(|&sum| sum == 0.0), "{why}");
    }
}

/// Planes of `[N, C, H, W]` side by side, in blocks of sixteen; `beyond` in the lanes that are left over.
fn blocked(planes: &Array4<f32>, beyond: f32) -> Vec<f32> {
    let (n, c, h, w) = planes.dim();
    let mut whole = Array4::from_elem([n, c.next_multiple_of(LANES), h, w], beyond);
    whole.slice_mut(s![.., ..c, .., ..]).assign(planes);
    let blocks = whole.into_shape_with_order([n, c.div_ceil(LANES), LANES, h, w]).unwrap();
    blocks.permuted_axes([0, 1, 3, 4, 2]).iter().copied().collect()
}

/// x and the output in blocks of channels, or one of them, and every plane as long as it is: the same bits.
#[test]
fn channels_in_blocks_have_the_same_bits() {
    let (im2col, winograd) = (conv(Algorithm::Im2col), conv(Algorithm::Winograd));
    let far = |algorithm| Conv2d { padding: Padding::All(7), ..conv(algorithm) };
    let sides = Padding::Sides { top: 3, bottom: 0, left: 0, right: 2 };
    let mut all = cases();
    for (why, x, w, conv) in [
        ("padding beyond whole tiles", [16, 5, 6], [32, 16, 3, 3], far(Algorithm::Winograd)),
        ("uneven padding", [16, 9, 10], [48, 16, 3, 3], Conv2d { padding: sides, ..winograd }),
        ("tiles within", [32, 19, 18], [16, 32, 3, 3], Conv2d { padding: Padding::Valid, ..winograd }),
        ("windows beyond the edge", [16, 5, 6], [32, 16, 3, 3], far(Algorithm::Im2col)),
        ("stride", [32, 13, 11], [16, 32, 5, 3], Conv2d { stride: (2, 3), padding: sides, ..im2col }),
        ("dilation", [48, 12, 11], [32, 48, 3, 2], Conv2d { dilation: (2, 3), ..im2col }),
        ("stride and dilation", [16, 17, 18], [16, 16, 3, 3], Conv2d { stride: (2, 2), dilation: (3, 2), ..im2col }),
        ("stride of windows of one pixel", [64, 14, 14], [96, 64, 1, 1], Conv2d { stride: (2, 2), ..im2col }),
    ] {
        all.push((why, Case::new([40, x[0], x[1], x[2]], w, conv)));
    }
    // Nothing is made of what lies in lanes without a channel, and nothing but 0 lies there afterwards.
    let lie =
        |is, planes: &Array4<f32>, beyond| if is { blocked(planes, beyond) } else { planes.iter().copied().collect() };
    let (mut count, mut partial) = (0, 0);
    for (why, case) in all {
        if !case.plan.may_be_blocked() {
            continue;
        }
        partial += usize::from(case.plan.shape.filters % LANES > 0 && case.plan.shape.channels % LANES > 0);
        let w = case.w.as_slice().unwrap();
        for (input, output) in [(false, true), (true, false), (true, true)] {
            count += 1;
            let format = |is: bool| if is { MemoryFormat::Blocked } else { MemoryFormat::Planar };
            let plan = case.plan.with_formats(Formats { input: format(input), output: format(output) });
            for (images, threads) in [(1, 1), (1, 2), (3, 2), (40, 1), (2, 5)] {
                let ([x, _], want) = (case.images(0..images), case.forward(0..images));
                let (x, want) = (lie(input, &x, 7.0), lie(output, &want, 0.0));
                let mut out = vec![f32::NAN; want.len()];
                let mut ws = poisoned::<f32>();
                let run = || conv2d_forward_into(&plan, images, &x, Filters::Plain(w), None, &mut out, &mut ws);
                with_threads(threads, run).unwrap();
                assert_bits(&out, &want, &format!("{why}: {images} images, {threads} threads, {input} -> {output}"));
            }
            for (images, threads) in [(1, 1), (40, 2)].into_iter().filter(|_| plan.gradients_may_be_blocked()) {
                let ([x, dout], want) = (case.images(0..images), case.backward(0..images));
                let (x, dout) = (lie(input, &x, 7.0), lie(output, &dout, 7.0));
                let (mut dx, mut dw, mut db) =
                    (vec![f32::NAN; x.len()], vec![f32::NAN; w.len()], vec![f32::NAN; plan.shape.filters]);
                let grads = ConvGradsMut { dx: Some(&mut dx), dw: Some(&mut dw), db: Some(&mut db) };
                let (conv_input, mut ws) = (ConvInput { images, x: &x, w }, poisoned::<f32>());
                with_threads(threads, || conv2d_backward_into(&plan, &dout, conv_input, grads, &mut ws)).unwrap();
                let what = |of| format!("{why}: {of}, {images} images, {threads} threads, {input} -> {output}");
                assert_bits(&dx, &lie(input, &want.dx, 0.0), &what("dx"));
                assert_bits(&dw, want.dw.as_slice().unwrap(), &what("dw"));
                let off = db.iter().zip(&want.db).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
                assert!(off <= 1e-5 * dout.len() as f32 / db.len() as f32, "{}: {off}", what("db"));
            }
        }
    }
    assert!(count > 30 && partial > 3, "{count} pairs of formats, {partial} cases of blocks that are not full");
}

#[test]
fn prepared_filters_give_the_same_bits() {
    for (why, case) in cases() {
        let (want, w) = (case.forward(0..3), case.w.as_slice().unwrap());
        let prepared = case.plan.prepare(w);
        let mut out = vec![f32::NAN; want.len()];
        let (x, filters) = (&case.x.as_slice().unwrap()[..3 * case.plan.image_len()], Filters::Prepared(&prepared));
        conv2d_forward_into(&case.plan, 3, x, filters, None, &mut out, &mut poisoned::<f32>());
        assert_bits(&out, &want, why);
    }
}

/// Finishes the product in bands of two rows, which leave one over where their number is odd, into smaller planes with cells: the
/// largest of two rows and two columns.
fn check_bands(why: &str, case: &Case<f32>, threads: usize) {
    let [_, filters, rows, cols] = case.plan.shape.out();
    let (images, plane) = (3, rows / 2 * (cols / 2));
    let (mut out, mut cells) = (vec![f32::NAN; images * filters * plane], vec![9; images * filters * plane]);
    let outputs =
        Outputs { out: &mut out, cells: &mut cells, out_plane: plane, out_cols: cols / 2, band: 2, side_by_side: 1 };
    let largest = |filter: usize, product: &mut [f32], out: &mut [f32], cells: &mut [u8]| {
        assert!(product.len() / cols / 2 * (cols / 2) == out.len() && out.len() == cells.len());
        for (i, (out, cell)) in out.iter_mut().zip(cells).enumerate() {
            let corner = i / (cols / 2) * 2 * cols + i % (cols / 2) * 2;
            let window = [0, 1, cols, cols + 1].map(|offset| product[corner + offset]);
            *out = window.into_iter().fold(f32::MIN, f32::max) + filter as f32;
            *cell = window.iter().position(|&v| v + filter as f32 == *out).unwrap() as u8;
        }
    };
    let x = &case.x.as_slice().unwrap()[..images * case.plan.image_len()];
    let (plan, w) = (&case.plan, Filters::Plain(case.w.as_slice().unwrap()));
    with_threads(threads, || forward(plan, images, x, w, outputs, largest, &mut poisoned::<f32>())).unwrap();
    let product = case.forward(0..images);
    for (i, (&got, &cell)) in out.iter().zip(&cells).enumerate() {
        let (n, f, row, col) = (i / plane / filters, i / plane % filters, i % plane / (cols / 2), i % (cols / 2));
        let (at_row, at_col) = (2 * row + cell as usize / 2, 2 * col + cell as usize % 2);
        assert_eq!(got, product[[n, f, at_row, at_col]] + f as f32, "{why}: {n}, {f}, {row}, {col}");
    }
}

#[test]
fn bands_are_finished_whole() {
    let same = |x, w| Case::new(x, w, Conv2d { padding: Padding::Same, ..Conv2d::default() });
    // where the last band has no more than the row that is left over
    let rests = [
        ("Winograd, many tiles", same([3, 16, 97, 97], [16, 16, 3, 3])),
        ("Winograd, fewer images than threads", same([3, 16, 25, 25], [16, 16, 3, 3])),
        ("tiles of two rows", same([3, 256, 31, 31], [256, 256, 5, 5])),
    ];
    let has_window = |(_, case): &(&str, Case<f32>)| case.plan.shape.rows.output >= 2;
    for (why, mut case) in cases().into_iter().chain(rests).filter(has_window) {
        case.plan = case.plan.with_bands(2);
        [1, 2, 5].into_iter().for_each(|threads| check_bands(why, &case, threads));
    }
}

#[test]
fn wrong_lengths_panic() {
    let panics = |run: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
    for (why, case) in cases() {
        let (plan, w) = (&case.plan, case.w.as_slice().unwrap());
        let (x, dout) = (&case.x.as_slice().unwrap()[..2 * plan.image_len()], case.dout.as_slice().unwrap());
        let dout = &dout[..dout.len() / 20];
        let forward = |x: &[f32], w: &[f32], b: usize, out: usize| {
            let (b, mut out) = (vec![0.0; b], vec![0.0; out]);
            conv2d_forward_into(plan, 2, x, Filters::Plain(w), Some(&b), &mut out, &mut Workspace::new());
        };
        let (filters, len) = (plan.shape.filters, dout.len());
        assert!(!panics(&|| forward(x, w, filters, len)), "{why}: right lengths");
        assert!(panics(&|| forward(&x[1..], w, filters, len)), "{why}: x");
        assert!(panics(&|| forward(x, &w[1..], filters, len)), "{why}: w");
        assert!(panics(&|| forward(x, w, filters - 1, len)), "{why}: b");
        assert!(panics(&|| forward(x, w, filters, len - 1)), "{why}: out");
        assert!(panics(&|| forward(x, w, filters, len + 1)), "{why}: out");
        let backward = |dout: &[f32], [dx, dw, db]: [usize; 3]| {
            let (mut dx, mut dw, mut db) = (vec![0.0; dx], vec![0.0; dw], vec![0.0; db]);
            let grads = ConvGradsMut { dx: Some(&mut dx), dw: Some(&mut dw), db: Some(&mut db) };
            conv2d_backward_into(plan, dout, ConvInput { images: 2, x, w }, grads, &mut Workspace::new());
        };
        let lens = [x.len(), w.len(), filters];
        assert!(!panics(&|| backward(dout, lens)), "{why}: right lengths");
        assert!(panics(&|| backward(&dout[1..], lens)), "{why}: dout");
        for i in 0..3 {
            for change in [-1, 1] {
                let mut lens = lens;
                lens[i] = lens[i].wrapping_add_signed(change);
                assert!(panics(&|| backward(dout, lens)), "{why}: gradient {i}");
            }
        }
    }
}

#[test]
fn a_plan_is_for_its_own_elements_and_filters() {
    let panics = |run: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
    let (single, other) = (Case::<f32>::new([1, 2, 5, 5], [3, 2, 3, 3], conv(Algorithm::Im2col)), [3, 2, 3, 3]);
    assert!(panics(&|| drop(single.plan.prepare::<f64>(&[0.0; 54]))), "a plan for f32");
    let valid = Case::<f32>::new([1, 2, 5, 5], other, Conv2d { padding: Padding::Valid, ..conv(Algorithm::Im2col) });
    let prepared = valid.plan.prepare(valid.w.as_slice().unwrap());
    let foreign = || {
        let (x, filters) = (single.x.as_slice().unwrap(), Filters::Prepared(&prepared));
        conv2d_forward_into(&single.plan, 1, x, filters, None, &mut [0.0; 75], &mut Workspace::new());
    };
    assert!(panics(&foreign), "prepared for another convolution");
    let many = Case::<f32>::new([1, 16, 6, 6], [16, 16, 3, 3], conv(Algorithm::Winograd));
    let prepared = many.plan.for_images(1).prepare(many.w.as_slice().unwrap());
    let foreign = || {
        let (x, filters) = (many.x.as_slice().unwrap(), Filters::Prepared(&prepared));
        conv2d_forward_into(&many.plan, 1, x, filters, None, &mut [0.0; 576], &mut Workspace::new());
    };
    assert!(panics(&foreign), "prepared for other tiles");
}
