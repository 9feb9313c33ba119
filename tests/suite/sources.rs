//! Images of any size, of bytes and floats, from memory and from a source of one's own: batches pixel by pixel,
//! statistics, what is refused, and training.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use gemmnet::data::{
    Arrays, Augment, Dataset, Draw, Fill, Flip, Image, Normalization, Normalizer, Pixel, Sampler, Source, Split, View,
    Views,
};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::parallel::with_threads;
use gemmnet::random::{Purpose, stream};
use gemmnet::train::{Checkpoint, Model, Solver, SolverOptions, accuracy, predict};
use gemmnet::{Element, Error};
use ndarray::{Array4, s};
use rand::RngExt;

/// Random bytes `(n, C, H, W)`.
fn bytes(n: usize, [c, h, w]: [usize; 3]) -> Array4<u8> {
    let mut rng = stream(n as u64, Purpose::Example, 0, 0);
    Array4::from_shape_simple_fn((n, c, h, w), || rng.random())
}

/// Random floats far from zero.
fn floats(n: usize, dim: [usize; 3]) -> Array4<f32> {
    let mut rng = stream(n as u64, Purpose::Example, 0, 1);
    bytes(n, dim).mapv(|byte| 1000.0 + f32::from(byte) / 255.0 + rng.random_range(-0.5..0.5))
}

/// The same images in every split, with labels in turn from 0 to 6.
fn dataset<P: Pixel>(images: &Array4<P>, normalization: Normalization) -> Dataset {
    let labels: Vec<usize> = (0..images.dim().0).map(|i| i % 7).collect();
    let labelled = (images.view(), &labels[..]);
    Dataset::from_arrays(labelled, labelled, labelled, normalization).unwrap()
}

/// An error message says all of this, in one line.
#[track_caller]
fn assert_refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(!message.contains('\n'), "an error is one line: {message}");
}

/// The place of a line of `len` that shows at `at`, if one does.
fn source(fill: Fill, at: isize, len: usize) -> Option<usize> {
    let last = len as isize - 1;
    match fill {
        Fill::Zeros if at < 0 || at > last => None,
        Fill::Reflect if at < 0 => Some((-at) as usize),
        Fill::Reflect if at > last => Some((2 * last - at) as usize),
        _ => Some(at as usize),
    }
}

/// Batches against the formula: normalised, mirrored, moved, with zeros around or reflected, and a square of zeros.
fn check_batches<P: Pixel, T: Element>(images: &Array4<P>, normalization: Normalization, augment: Option<Augment>) {
    let data = dataset(images, normalization);
    let (n, c, h, w) = images.dim();
    assert_eq!((data.dim(), data.image_len(), data.classes()), ([c, h, w], c * h * w, 7));
    let (mean, scale) = (data.normalizer().mean(), data.normalizer().scale());
    let indices = [n - 1, 0, 3, 3, 5];
    for epoch in 0..12 {
        let (mut x, mut y) = (vec![T::nan(); indices.len() * c * h * w], [9; 5]);
        let draw = Draw::augmented(Split::Train, augment, 7, epoch);
        data.fill_batch(draw, &indices, &mut x, &mut y).unwrap();
        let x = Array4::from_shape_vec((indices.len(), c, h, w), x).unwrap();
        for (i, index) in indices.into_iter().enumerate() {
            assert_eq!(y[i], index % 7);
            let mut rng = stream(7, Purpose::Augment, epoch, index as u64);
            let Augment { flip, shift, fill, cutout } = augment.unwrap_or_default();
            let coin = rng.random_bool(0.5);
            let first = stream(7, Purpose::Augment, 0, index as u64).random_bool(0.5);
            let mirrored = match flip {
                Flip::None => false,
                Flip::Random => coin,
                Flip::Alternating => first != (epoch % 2 == 1),
            };
            let mut move_by = || rng.random_range(0..=2 * shift) as isize - shift as isize;
            let (down, right) = (move_by(), move_by());
            let corner = [h, w].map(|len| rng.random_range(0..len) as isize - cutout as isize / 2);
            let cut = |place, corner| (corner..corner + cutout as isize).contains(&(place as isize));
            for ((channel, to_row, to_column), &value) in x.slice(s![i, .., .., ..]).indexed_iter() {
                let row = source(fill, to_row as isize - down, h);
                let column = source(fill, to_column as isize - right, w);
                let hole = cut(to_row, corner[0]) && cut(to_column, corner[1]);
                let expected = row.zip(column).filter(|_| !hole).map_or(0.0, |(row, column)| {
                    let column = if mirrored { w - 1 - column } else { column };
                    let pixel: f32 = images[[index, channel, row, column]].into();
                    (pixel - mean[(channel * h + row) * w + column]) * scale[channel]
                });
                let place = [index, channel, to_row, to_column];
                assert_eq!(value, T::of(expected.into()), "epoch {epoch}, {place:?}, {mirrored} {down} {right}");
            }
        }
    }
}

#[test]
fn batches_are_what_the_formula_says_at_any_size() {
    let moved = |shift| Some(Augment { flip: Flip::Random, shift, ..Augment::NONE });
    let reflected = |shift| Augment { flip: Flip::Alternating, shift, fill: Fill::Reflect, cutout: 0 };
    for (dim, shift) in [
        ([1, 28, 28], 3),
        ([3, 48, 40], 39), // as far as it can go: the shorter side is the width
        ([2, 5, 9], 4),    // here it is the height
        ([4, 1, 1], 0),    // nothing to move
        ([1, 3, 64], 2),
        ([5, 33, 17], 7), // rows that no vector divides
    ] {
        check_batches::<u8, f32>(&bytes(9, dim), Normalization::MeanImage, None);
        check_batches::<u8, f32>(&bytes(9, dim), Normalization::PerChannel, moved(shift));
        check_batches::<u8, f64>(&bytes(9, dim), Normalization::MeanImage, moved(shift));
        check_batches::<f32, f32>(&floats(9, dim), Normalization::PerChannel, moved(shift));
        check_batches::<f32, f64>(&floats(9, dim), Normalization::MeanImage, Some(Augment { shift, ..Augment::NONE }));
        check_batches::<u8, f32>(&bytes(9, dim), Normalization::MeanImage, Some(reflected(shift)));
        check_batches::<f32, f64>(&floats(9, dim), Normalization::PerChannel, Some(reflected(shift)));
        for cutout in [shift / 2, shift] {
            let augment = Augment { cutout, ..reflected(shift) };
            check_batches::<u8, f32>(&bytes(9, dim), Normalization::PerChannel, Some(augment));
            let augment = Augment { fill: Fill::Zeros, ..augment };
            check_batches::<u8, f32>(&bytes(9, dim), Normalization::MeanImage, Some(augment));
        }
    }
}

#[test]
fn every_placement_comes_up_and_half_of_the_images_are_mirrored() {
    let images = bytes(9, [2, 12, 9]);
    let data = dataset(&images, Normalization::MeanImage);
    let image = |augment, epoch| {
        let mut x = vec![f32::NAN; data.image_len()];
        let draw = Draw::augmented(Split::Train, augment, 1, epoch);
        data.fill_batch(draw, &[4], &mut x, &mut [0]).unwrap();
        Array4::from_shape_vec((1, 2, 12, 9), x).unwrap()
    };
    let plain = image(None, 0);
    assert_eq!(image(Some(Augment::default()), 3), plain);
    let (mut placements, mut mirrored) = (BTreeSet::new(), 0);
    for epoch in 0..200 {
        let seen = image(Some(Augment { flip: Flip::Random, shift: 2, ..Augment::NONE }), epoch);
        // Which of the 50 possible pictures is it?
        let is = |flip: bool, down: isize, right: isize| {
            seen.indexed_iter().all(|((n, c, h, w), &value)| {
                let source = |to: usize, by: isize, len| to.checked_add_signed(-by).filter(|&from| from < len);
                let expected = match (source(h, down, 12), source(w, right, 9)) {
                    (Some(h), Some(w)) => plain[[n, c, h, if flip { 8 - w } else { w }]],
                    _ => 0.0,
                };
                value == expected
            })
        };
        let all = (-2..=2).flat_map(|down| (-2..=2).flat_map(move |right| [(false, down, right), (true, down, right)]));
        let matches: Vec<_> = all.filter(|&(flip, down, right)| is(flip, down, right)).collect();
        assert_eq!(matches.len(), 1, "epoch {epoch}: {matches:?}");
        placements.insert((matches[0].1, matches[0].2));
        mirrored += usize::from(matches[0].0);
    }
    assert_eq!(placements.len(), 25);
    assert!((70..130).contains(&mirrored), "{mirrored} of 200 mirrored");
}

#[test]
fn alternating_mirrors_half_of_the_images_and_then_the_others() {
    let images = bytes(200, [2, 3, 4]);
    let data = dataset(&images, Normalization::MeanImage);
    let all: Vec<usize> = (0..200).collect();
    let batch = |draw| {
        let mut x = vec![f32::NAN; 200 * data.image_len()];
        data.fill_batch(draw, &all, &mut x, &mut [0; 200]).unwrap();
        x
    };
    let [plain, other] = [View::PLAIN, View::MIRRORED].map(|view| batch(Draw::view(Split::Train, view)));
    let mirrored = |epoch| -> Vec<bool> {
        let augment = Augment { flip: Flip::Alternating, ..Augment::NONE };
        let x = batch(Draw::augmented(Split::Train, Some(augment), 5, epoch));
        let [x, plain, other] = [&x, &plain, &other].map(|x| x.chunks_exact(data.image_len()));
        let which = x.zip(plain.zip(other)).map(|(x, (plain, other))| {
            assert!((x == plain) != (x == other), "one of the two");
            x == other
        });
        which.collect()
    };
    let first = mirrored(0);
    let count = first.iter().filter(|&&mirrored| mirrored).count();
    assert!((70..130).contains(&count), "{count} of 200 mirrored");
    for epoch in 1..8 {
        let expected: Vec<_> = first.iter().map(|&mirrored| mirrored != (epoch % 2 == 1)).collect();
        assert_eq!(mirrored(epoch), expected, "epoch {epoch}");
    }
}

#[test]
fn augmentation_does_not_depend_on_batch_order_or_threads() {
    let data = dataset(&bytes(70, [3, 10, 14]), Normalization::MeanImage);
    let augment = Some(Augment { flip: Flip::Random, shift: 4, fill: Fill::Reflect, cutout: 5 });
    let fill = |threads: usize, indices: &[usize], epoch: u64, seed: u64| {
        let (mut x, mut y) = (vec![0_f32; indices.len() * data.image_len()], vec![0; indices.len()]);
        let draw = Draw::augmented(Split::Train, augment, seed, epoch);
        with_threads(threads, || data.fill_batch(draw, indices, &mut x, &mut y)).unwrap().unwrap();
        x
    };
    let forward: Vec<_> = (0..64).collect();
    let backward: Vec<_> = (0..64).rev().collect();
    let (a, b) = (fill(1, &forward, 2, 0), fill(3, &backward, 2, 0));
    for (image, other) in a.chunks_exact(data.image_len()).zip(b.chunks_exact(data.image_len()).rev()) {
        assert_eq!(image, other);
    }
    assert_ne!(a, fill(1, &forward, 3, 0));
    assert_ne!(a, fill(1, &forward, 2, 1));
}

/// Against two passes over the numbers, in `f64`. The floats have 1000 times their deviation as their mean.
#[test]
fn statistics_are_those_of_the_training_split() {
    fn check<P: Pixel>(images: &Array4<P>, rel: f64) {
        let (n, c, h, w) = images.dim();
        let wide = images.mapv(|pixel| -> f64 { pixel.into() });
        let data = dataset(images, Normalization::MeanImage);
        assert_eq!(data.normalizer().dim(), [c, h, w]);
        assert_eq!(data.normalizer().scale(), vec![1.0; c]);
        for (i, &mean) in data.normalizer().mean().iter().enumerate() {
            let pixel = wide.slice(s![.., i / (h * w), i / w % h, i % w]);
            assert_eq!(mean, (pixel.sum() / n as f64) as f32, "pixel {i}");
        }
        let data = dataset(images, Normalization::PerChannel);
        for channel in 0..c {
            let values = wide.slice(s![.., channel, .., ..]);
            let mean = values.mean().unwrap();
            let variance = values.mapv(|value| (value - mean) * (value - mean)).mean().unwrap();
            assert!(data.normalizer().mean()[channel * h * w..][..h * w].iter().all(|&m| m == mean as f32));
            let scale = f64::from(data.normalizer().scale()[channel]);
            assert!((scale * variance.sqrt() - 1.0).abs() < rel, "{scale}, {variance}");
        }
    }
    for dim in [[1, 28, 28], [3, 6, 5], [2, 1, 33]] {
        check(&bytes(60, dim), 1e-7);
        check(&floats(60, dim), 1e-7);
    }
}

#[test]
fn statistics_are_the_same_at_any_number_of_threads() {
    // Several pieces, whose sums are not exact.
    let images = floats(3000, [2, 6, 5]);
    for normalization in [Normalization::MeanImage, Normalization::PerChannel] {
        let [one, three] = [1, 3]
            .map(|threads| with_threads(threads, || dataset(&images, normalization).normalizer().clone()).unwrap());
        assert_eq!(one, three, "{normalization:?}");
    }
}

/// The sum of the squares of one plane of the first set does not fit 32 bits.
#[test]
fn large_and_flat_planes_have_statistics_too() {
    let images = Array4::from_shape_fn((2, 1, 300, 310), |(n, ..)| if n == 0 { 255_u8 } else { 251 });
    let data = dataset(&images, Normalization::PerChannel);
    assert_eq!((data.normalizer().mean()[0], data.normalizer().scale()), (253.0, &[0.5][..]));
    for flat in [0.1_f32, -3e38, 1e-40] {
        let data = dataset(&Array4::from_elem((3, 2, 4, 5), flat), Normalization::PerChannel);
        assert_eq!((data.normalizer().mean()[39], data.normalizer().scale()), (flat, &[1.0; 2][..]));
        let mut x = vec![f32::NAN; 40];
        data.fill_batch(Draw::plain(Split::Test), &[1], &mut x, &mut [0]).unwrap();
        assert_eq!(x, [0.0; 40]);
    }
}

#[test]
fn batches_that_do_not_fit_are_errors() {
    let data = dataset(&bytes(8, [1, 20, 30]), Normalization::MeanImage);
    let (mut x, mut y) = (vec![0_f32; 600], [0; 1]);
    let mut fill = |indices: &[usize], shift| {
        let draw = Draw::augmented(Split::Train, Some(Augment { shift, ..Augment::NONE }), 0, 0);
        data.fill_batch(draw, indices, &mut x, &mut y)
    };
    fill(&[7], 19).unwrap();
    assert_refused(fill(&[8], 0), &["no image 8 among 8"]);
    assert_refused(fill(&[1, 2], 0), &["batch: x", "[600]", "[1200]"]);
    assert_refused(fill(&[1], 20), &["shift by 20 pixels", "30x20", "less than 20"]);
    assert_refused(data.fill_batch(Draw::plain(Split::Test), &[1], &mut [0_f32; 600], &mut []), &["batch: y"]);
    let down = View { down: -20, ..View::PLAIN };
    assert_refused(
        data.fill_batch(Draw::view(Split::Test, down), &[1], &mut [0_f32; 600], &mut [0]),
        &["view", "0x20"],
    );
    let few = data.limit(Split::Validation, 3).unwrap();
    let draw = Draw::plain(Split::Validation);
    assert_refused(few.fill_batch(draw, &[3], &mut [0_f32; 600], &mut [0]), &["no image 3 among 3"]);
    assert_refused(few.limit(Split::Validation, 4), &["validation split", "4 of 3", "1 to 3"]);
}

#[test]
fn arrays_that_do_not_fit_are_errors() {
    let images = bytes(4, [1, 6, 5]);
    let names = || ["cup", "jug", "pot"].map(String::from).to_vec();
    let arrays = |labels: [i64; 4]| {
        let labelled = (images.view(), &labels[..]);
        Arrays::new(names(), labelled, labelled, labelled)
    };
    assert_eq!(arrays([0, 2, 1, 0]).unwrap().class_names(), names());
    assert_refused(arrays([0, 2, 3, 3]), &["training split", "image 2 has label 3", "3 classes", "0 to 2"]);
    assert_refused(arrays([0, -1, 2, 0]), &["image 1 has label -1"]);
    let good = (images.view(), &[0_u32, 2, 1, 0][..]);
    let bad = (images.view(), &[0_u32, 2, 1, 7][..]);
    assert_refused(Arrays::new(names(), good, good, bad), &["test split", "image 3 has label 7"]);
    assert_refused(Arrays::new(Vec::new(), good, good, good), &["image 0 has label 0", "0 classes"]);
    // Numbered classes: as many as the largest label says, unless it is absurd.
    assert_eq!(Arrays::numbered(good, good, bad).unwrap().class_names().len(), 8);
    let absurd = (images.view(), &[0_u32, u32::MAX, 1, 7][..]);
    assert_refused(Arrays::numbered(good, absurd, good), &["validation split", "image 1 has label 4294967295"]);

    let short = (images.view(), &[0_u32, 2, 1][..]);
    assert_refused(Arrays::numbered(short, good, good), &["training split", "[4, 1, 6, 5]", "[3, 1, 6, 5]"]);
    let other = bytes(4, [1, 5, 6]);
    let other = (other.view(), good.1);
    assert_refused(Arrays::numbered(good, good, other), &["test split", "[4, 1, 5, 6]", "[4, 1, 6, 5]"]);

    let from_arrays = |train, validation, test| Dataset::from_arrays(train, validation, test, Normalization::MeanImage);
    let none = (images.slice(s![..0, .., .., ..]), &[][..]);
    assert_refused(from_arrays(none, good, good), &["training split", "0 images"]);
    assert_refused(from_arrays(good, none, good), &["validation split", "0 images"]);
    assert_eq!(from_arrays(good, good, none).unwrap().len(Split::Test), 0, "not everybody has test images");
    let thin = Array4::<u8>::zeros((4, 1, 0, 5));
    let thin = (thin.view(), good.1);
    assert_refused(from_arrays(thin, thin, thin), &["[1, 0, 5]", "1 or more"]);
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for normalization in [Normalization::MeanImage, Normalization::PerChannel] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut images = floats(5, [2, 3, 3]);
            images[[3, 1, 0, 2]] = bad;
            let labels = [0_u8; 5];
            let labelled = (images.view(), &labels[..]);
            let data = Dataset::from_arrays(labelled, labelled, labelled, normalization);
            assert_refused(data, &["training split", "image 3", &bad.to_string()]);
        }
    }
}

#[test]
fn a_normaliser_of_another_size_is_refused() {
    let data = dataset(&bytes(8, [3, 48, 40]), Normalization::PerChannel);
    let turned = dataset(&bytes(8, [3, 40, 48]), Normalization::PerChannel).normalizer().clone();
    assert_refused(data.clone().with_normalizer(turned), &["normaliser", "3x40x48", "3x48x40"]);
    let same = Normalizer::new([3, 48, 40], vec![3.0; 5760], vec![2.0; 3]).unwrap();
    assert_eq!(data.with_normalizer(same.clone()).unwrap().normalizer(), &same);

    let pixels = [7_u8; 5760];
    let mut out = vec![0_f32; 5760];
    same.apply(Image::Bytes(&pixels), &mut out).unwrap();
    assert_eq!(out, [8.0; 5760]);
    same.apply(Image::Floats(&[3.5; 5760]), &mut out).unwrap();
    assert_eq!(out, [1.0; 5760]);
    assert_refused(same.apply(Image::Bytes(&pixels[1..]), &mut out), &["image", "[5759]", "[5760]"]);
    assert_refused(same.apply(Image::Bytes(&pixels), &mut out[1..]), &["out", "[5759]"]);

    assert_refused(Normalizer::new([3, 2, 2], vec![0.0; 7], vec![1.0; 3]), &["mean", "[7]", "[12]"]);
    assert_refused(Normalizer::new([3, 2, 2], vec![0.0; 12], vec![1.0]), &["scale", "[1]", "[3]"]);
    assert_refused(Normalizer::new([1, usize::MAX, 2], vec![0.0; 12], vec![1.0]), &["mean", "[12]"]);
    assert_refused(Normalizer::new([1, 1, 1], vec![f32::NAN], vec![1.0]), &["NaN"]);
}

/// A source of one's own: grey ramps that exist in no file and no array of images.
#[derive(Debug)]
struct Ramps {
    dim: [usize; 3],
    names: Vec<String>,
    /// All values that an image can have; image `i` begins at `i`.
    values: Vec<f32>,
    /// What the label of image 11 is.
    eleventh: usize,
}

impl Ramps {
    fn new() -> Self {
        let names = ["even", "odd"].map(String::from).to_vec();
        Ramps { dim: [1, 4, 6], names, values: (0..44).map(|i| i as f32).collect(), eleventh: 1 }
    }
}

impl Source for Ramps {
    fn dim(&self) -> [usize; 3] {
        self.dim
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self, split: Split) -> usize {
        if split == Split::Train { 20 } else { 12 }
    }

    fn image(&self, _: Split, index: usize) -> (Image<'_>, usize) {
        (Image::Floats(&self.values[index..][..24]), if index == 11 { self.eleventh } else { index % 2 })
    }
}

#[test]
fn a_source_of_ones_own_is_lent_not_copied_and_checked_once() {
    let source = Arc::new(Ramps::new());
    let data = Dataset::new(source.clone(), Normalization::MeanImage).unwrap();
    let (Image::Floats(lent), 1) = data.image(Split::Test, 5) else { panic!("an image of floats of class 1") };
    assert!(std::ptr::eq(lent.as_ptr(), &source.values[5]));
    let (mut x, mut y) = (vec![0_f64; 48], [0; 2]);
    data.fill_batch(Draw::plain(Split::Test), &[9, 2], &mut x, &mut y).unwrap();
    assert_eq!((&x[..24], &x[24..], y), (&[-0.5; 24][..], &[-7.5; 24][..], [1, 0]));
    assert!(data.notes().is_empty());

    let refused = |source, parts: &[&str]| {
        assert_refused(Dataset::new(Arc::new(source), Normalization::MeanImage), parts);
    };
    refused(Ramps { eleventh: 2, ..Ramps::new() }, &["training split", "image 11 has label 2", "0 to 1"]);
    refused(Ramps { dim: [1, 5, 5], ..Ramps::new() }, &["an image", "[24]", "[25]"]);
    refused(Ramps { dim: [1, 0, 24], ..Ramps::new() }, &["[1, 0, 24]"]);
    refused(Ramps { dim: [2, usize::MAX, 3], ..Ramps::new() }, &["as a memory can hold"]);
}

#[test]
fn options_are_spelled_as_checkpoints_spell_them() {
    let json = |value: serde_json::Value, text: &str| assert_eq!(value.to_string(), text);
    json(
        serde_json::to_value([Sampler::ShuffledEpochs, Sampler::WithReplacement]).unwrap(),
        r#"["shuffled-epochs","with-replacement"]"#,
    );
    let augment = Augment { flip: Flip::Random, shift: 4, ..Augment::NONE };
    json(serde_json::to_value(augment).unwrap(), r#"{"cutout":0,"fill":"zeros","flip":"random","shift":4}"#);
    json(
        serde_json::to_value([Normalization::MeanImage, Normalization::PerChannel]).unwrap(),
        r#"["mean-image","per-channel"]"#,
    );
    let sampler: Sampler = serde_json::from_str(r#""with-replacement""#).unwrap();
    let augment: Option<Augment> = serde_json::from_str(r#"{"flip":false,"shift":2}"#).unwrap();
    assert_eq!((sampler, augment), (Sampler::WithReplacement, Some(Augment { shift: 2, ..Augment::NONE })));
}

/// `classes` classes: image `i` has a bright bar at its class's place on a noisy ground.
fn bars(n: usize, [c, h, w]: [usize; 3], classes: usize, seed: u64) -> (Array4<u8>, Vec<u16>) {
    let mut rng = stream(seed, Purpose::Example, 0, 2);
    let images = Array4::from_shape_fn((n, c, h, w), |(n, _, _, x)| {
        rng.random_range(0..100_u8) + if x * classes / w == n % classes { 120 } else { 0 }
    });
    (images, (0..n).map(|n| (n % classes) as u16).collect())
}

/// Trains, saves, loads and predicts through the public interface.
fn check_training<P: Pixel>(dim: [usize; 3], names: &[&str], wanted: f64, pixel: impl Fn(u8) -> P) {
    let names: Vec<String> = names.iter().copied().map(String::from).collect();
    let [train, validation, test] =
        [(140, 1), (35, 2), (70, 3)].map(|(n, seed)| bars(n, dim, names.len(), seed)).map(|(x, y)| (x.mapv(&pixel), y));
    let [a, b, c] = [&train, &validation, &test].map(|(images, labels)| (images.view(), &labels[..]));
    let data = Dataset::new(Arc::new(Arrays::new(names.clone(), a, b, c).unwrap()), Normalization::PerChannel).unwrap();
    assert_eq!(data.classes(), names.len());

    let spec = NetworkSpec::parse(&format!("conv8-bn-relu-pool2-affine{}", names.len())).unwrap();
    let network = |dim| Network::<f32>::new(&spec, dim, Init::He, 0).unwrap();
    let augment = Some(Augment { shift: 1, ..Augment::NONE });
    let options = SolverOptions { epochs: 6.0, batch_size: 10, augment, verbose: false, ..SolverOptions::default() };
    let mut solver = Solver::new(network(dim), data.clone(), options.clone()).unwrap();
    let report = solver.train(|_| ControlFlow::Continue(())).unwrap();
    assert!(report.kept_val_accuracy >= wanted, "{report:?}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bars.safetensors");
    solver.checkpoint().save(&path).unwrap();
    let mut trained = Model::<f32>::load(&path).unwrap();
    assert_eq!((trained.normalizer.as_ref(), &trained.class_names), (Some(data.normalizer()), &names));
    let mut predicted = |data: &Dataset| predict(&mut trained.network, data, Split::Test, 32, Views::One);
    let right = predicted(&data)
        .unwrap()
        .iter()
        .zip(&test.1)
        .filter(|(class, label)| **class == Some(usize::from(**label)))
        .count();
    assert!(right as f64 >= wanted * 70.0, "{right} of 70");

    // On images of another size each step says so: both sizes, and what to do.
    let [channels, height, width] = dim;
    let turned = [channels, height + 1, width];
    let written = |dim: [usize; 3]| dim.map(|n| n.to_string()).join("x");
    let (ours, theirs) = (written(dim), written(turned));
    let other = dataset(&bytes(8, turned), Normalization::PerChannel);
    assert_refused(predicted(&other), &["network", &ours, &theirs, "give data"]);
    assert_refused(accuracy(&mut network(turned), &data, Split::Test, 8, Views::One), &["network", &ours, &theirs]);
    assert_refused(Solver::new(network(turned), data.clone(), options), &["network", &ours, &theirs]);
    let checkpoint = Checkpoint::<f32>::load(&path).unwrap();
    assert_refused(Solver::resume(checkpoint, other), &["normaliser", &ours, &theirs]);
}

#[test]
fn grey_pictures_of_seven_classes_are_learnt() {
    check_training([1, 28, 28], &["do", "re", "mi", "fa", "sol", "la", "ti"], 0.9, |byte| byte);
}

#[test]
fn coloured_pictures_that_are_not_square_are_learnt_from_floats() {
    check_training([3, 48, 40], &["left", "middle", "right"], 0.9, |byte| f32::from(byte) / 255.0);
}

#[test]
fn a_split_without_images_has_no_accuracy() {
    let images = bytes(7, [1, 8, 8]);
    let labels = [0_u8, 1, 0, 1, 0, 1, 0];
    let some = (images.view(), &labels[..]);
    let none = (images.slice(s![..0, .., .., ..]), &[][..]);
    let data = Dataset::from_arrays(some, some, none, Normalization::MeanImage).unwrap();
    let spec = NetworkSpec::parse("conv2-relu-affine2").unwrap();
    let mut network = Network::<f32>::new(&spec, [1, 8, 8], Init::He, 0).unwrap();
    assert_refused(accuracy(&mut network, &data, Split::Test, 4, Views::One), &["test split", "0 images"]);
    assert_refused(predict(&mut network, &data, Split::Test, 4, Views::One), &["test split", "0 images"]);
}

#[test]
fn six_views_need_two_pixels() {
    let data = dataset(&bytes(8, [1, 1, 6]), Normalization::MeanImage);
    let mut network = Network::<f32>::new(&"affine7".parse().unwrap(), [1, 1, 6], Init::He, 0).unwrap();
    predict(&mut network, &data, Split::Test, 4, Views::Two).unwrap();
    assert_refused(predict(&mut network, &data, Split::Test, 4, Views::Six), &["view", "6x1", "1x1 pixels"]);
}
