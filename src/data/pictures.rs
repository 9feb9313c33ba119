//! Level 5. A data set drawn by this program, for machines without CIFAR-10.
//!
//! Ten classes of shapes and patterns, 32 x 32 pixels, in memory or in CIFAR-10's files, so that everything that reads
//! those reads these. Place, size, turn and colours are random, and the background may be the brighter part, so that no weighted sum
//! of pixels tells the classes apart: a linear classifier gets few of them right, a small convolutional network most. A
//! few pictures are faint or half covered on purpose; their labels are true all the same.

use std::f32::consts::{PI, TAU};
use std::path::Path;

use rand::{Rng, RngExt};
use rand_distr::StandardNormal;

use super::cifar10::{
    CHANNELS, CLASSES, DIM, NAMES, RECORD, Records, SIDE, Splits, TEST_BATCH, TRAIN_BATCHES, read_names,
};
use super::source::{Image, Source, Split};
use crate::error::{Error, Result};
use crate::parallel;
use crate::random::{Purpose, stream};
use crate::store::write_beside;

/// The classes, by label.
pub const CLASS_NAMES: [&str; CLASSES] =
    ["disc", "ring", "square", "triangle", "cross", "crescent", "pair", "stripes", "checkers", "spiral"];

/// Records per batch that are plenty for a first try: 12,000 in all, 37 MB.
pub const DEFAULT_RECORDS: usize = 2_000;

/// The pictures in memory: those, and in those splits, that [`write_pictures`] writes to files.
#[derive(Debug)]
pub struct Pictures {
    splits: Splits,
    class_names: Vec<String>,
}

impl Pictures {
    /// Draws six batches of `records` pictures each: 3,073 bytes a picture.
    ///
    /// The same seed draws the same pictures (to the bit on the same platform: the sine is the system's).
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 records.
    pub fn draw(seed: u64, records: usize) -> Result<Self> {
        check_records(records)?;
        let batch = |batch: usize| Records::from_bytes(draw_batch(seed, batch, records));
        let train = (0..TRAIN_BATCHES.len()).map(batch).collect();
        let splits = Splits { train, test: batch(TRAIN_BATCHES.len()) };
        Ok(Pictures { splits, class_names: CLASS_NAMES.map(String::from).to_vec() })
    }
}

impl Source for Pictures {
    fn dim(&self) -> [usize; 3] {
        DIM
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn len(&self, split: Split) -> usize {
        self.splits.len(split)
    }

    fn image(&self, split: Split, index: usize) -> (Image<'_>, usize) {
        self.splits.image(split, index)
    }
}

fn check_records(records: usize) -> Result<()> {
    if records == 0 {
        return Err(Error::invalid("pictures", "0 records make no batch", "ask for 1 or more"));
    }
    Ok(())
}

/// Batch `batch` of the five with training records and the one with test records, as the bytes of its file.
fn draw_batch(seed: u64, batch: usize, records: usize) -> Vec<u8> {
    let mut bytes = vec![0; records * RECORD];
    parallel::for_each_chunk_mut(&mut bytes, RECORD, |i, record| {
        let mut rng = stream(seed, Purpose::Picture, batch as u64, i as u64);
        let label = rng.random_range(0..CLASSES as u8);
        record[0] = label;
        draw(label, &mut rng, &mut record[1..]);
    });
    bytes
}

/// Draws six batches of `records` pictures each and writes them to `dir` under CIFAR-10's names, with
/// `batches.meta.txt`. The folder is made if need be. An earlier set of pictures is replaced, other data never. The six
/// files appear when all of them are complete, or not at all.
///
/// The same seed draws the same pictures (to the bit on the same platform: the sine is the system's).
///
/// # Errors
/// [`Error::Invalid`] for 0 records, [`Error::Data`] if `dir` holds other batches, [`Error::Io`] if it cannot be written.
pub fn write_pictures(dir: &Path, seed: u64, records: usize) -> Result<()> {
    check_records(records)?;
    let batches = || TRAIN_BATCHES.into_iter().chain([TEST_BATCH]);
    if batches().any(|name| dir.join(name).exists()) && read_names(dir) != CLASS_NAMES {
        let fix = "choose another folder, or remove its batches";
        return Err(Error::data(dir, "already holds batches that are no pictures of ours", fix));
    }
    let failed = |e| {
        let megabytes = (6 * records * RECORD).div_ceil(1_000_000);
        Error::io("write", dir, e, format!("choose a folder that can be written, with {megabytes} MB of free space"))
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut files = Vec::new();
    for (batch, name) in batches().enumerate() {
        let bytes = draw_batch(seed, batch, records);
        files.push((name, write_beside(dir, &bytes).map_err(failed)?));
    }
    let names = CLASS_NAMES.map(|name| format!("{name}\n")).concat();
    files.push((NAMES, write_beside(dir, names.as_bytes()).map_err(failed)?));
    // The names go first: with them, a set that is cut off here is known as ours and can be replaced.
    for (name, file) in files.into_iter().rev() {
        file.persist(dir.join(name)).map_err(|e| failed(e.error))?;
    }
    Ok(())
}

type Colour = [f32; CHANNELS];

/// Draws one picture of class `label` into `pixels` `(3, 32, 32)`.
fn draw(label: u8, rng: &mut impl Rng, pixels: &mut [u8]) {
    let mut canvas = [[0.0; CHANNELS]; SIDE * SIDE];
    let hard = rng.random_bool(0.06);
    let (object, ground) = colours(rng, if hard { 25.0..45.0 } else { 45.0..140.0 });

    // The ground: a slope between two shades of its colour.
    let angle = rng.random_range(0.0..TAU);
    let slope = rng.random_range(0.0..40.0);
    paint(&mut canvas, |x, y| {
        let t = slope * (x * angle.cos() + y * angle.sin()) / SIDE as f32;
        (ground.map(|c| c + t), 1.0)
    });
    for _ in 0..rng.random_range(0..4) {
        speck(&mut canvas, rng, 5.0);
    }

    let shape = Shape::random(label, rng);
    let shade = rng.random_range(-0.5..0.5);
    paint(&mut canvas, |x, y| (object.map(|c| c + shade * (x + y)), shape.cover(x, y)));

    for _ in 0..rng.random_range(0..3) {
        speck(&mut canvas, rng, 4.0);
    }
    if hard {
        speck(&mut canvas, rng, 14.0);
    }
    let noise = rng.random_range(2.0..if hard { 30.0 } else { 16.0 });
    for (i, colour) in canvas.iter().enumerate() {
        for (channel, value) in colour.iter().enumerate() {
            let grain: f32 = rng.sample(StandardNormal);
            pixels[channel * SIDE * SIDE + i] = (value + noise * grain).round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// Colours of object and ground whose brightness differs by an amount from `contrast`, either way round.
fn colours(rng: &mut impl Rng, contrast: std::ops::Range<f32>) -> (Colour, Colour) {
    let difference = rng.random_range(contrast);
    let dark = rng.random_range(15.0..240.0 - difference);
    let mut tinted = |brightness: f32| {
        let tint: Colour = std::array::from_fn(|_| rng.random_range(-40.0..40.0));
        let mean = tint.iter().sum::<f32>() / CHANNELS as f32;
        tint.map(|t| brightness + t - mean)
    };
    let (dark, bright) = (tinted(dark), tinted(dark + difference));
    // Objects are mostly the brighter part, which leaves a linear classifier something to hold on to.
    if rng.random_bool(0.8) { (bright, dark) } else { (dark, bright) }
}

/// Blends what `colour_and_cover` gives for every pixel centre into the canvas. (0, 0) is the middle of the picture.
fn paint(canvas: &mut [Colour], colour_and_cover: impl Fn(f32, f32) -> (Colour, f32)) {
    let middle = (SIDE as f32 - 1.0) / 2.0;
    for (i, under) in canvas.iter_mut().enumerate() {
        let (colour, cover) = colour_and_cover((i % SIDE) as f32 - middle, (i / SIDE) as f32 - middle);
        for (value, new) in under.iter_mut().zip(colour) {
            *value += cover * (new - *value);
        }
    }
}

/// A bar of any colour that belongs to no class, `size` pixels long at most.
fn speck(canvas: &mut [Colour], rng: &mut impl Rng, size: f32) {
    let colour = std::array::from_fn(|_| rng.random_range(0.0..255.0));
    let at: [f32; 2] = std::array::from_fn(|_| rng.random_range(-15.0..15.0));
    let turn = rng.random_range(0.0..PI);
    let (length, width) = (rng.random_range(0.5..1.0) * size / 2.0, rng.random_range(0.4..1.2));
    paint(canvas, |x, y| {
        let (u, v) = rotate(x - at[0], y - at[1], turn);
        (colour, edge((u.abs() - length).max(v.abs() - width)))
    });
}

/// How much of a pixel an area covers whose edge is `distance` pixels away (inside negative): edges are one pixel wide.
fn edge(distance: f32) -> f32 {
    (0.5 - distance).clamp(0.0, 1.0)
}

fn rotate(x: f32, y: f32, turn: f32) -> (f32, f32) {
    let (sin, cos) = turn.sin_cos();
    (x * cos + y * sin, y * cos - x * sin)
}

/// The object of a picture: a class, a place, and numbers that each class reads in its own way.
struct Shape {
    label: u8,
    at: [f32; 2],
    /// Half its extent in pixels.
    radius: f32,
    turn: f32,
    /// Height over width.
    aspect: f32,
    /// Two free numbers in 0..1.
    form: [f32; 2],
}

impl Shape {
    fn random(label: u8, rng: &mut impl Rng) -> Self {
        let radius = rng.random_range(6.0..12.0);
        let room = 14.0 - radius;
        Shape {
            label,
            at: std::array::from_fn(|_| rng.random_range(-room..room)),
            radius,
            turn: rng.random_range(0.0..TAU),
            aspect: rng.random_range(0.8..1.25),
            form: std::array::from_fn(|_| rng.random()),
        }
    }

    /// How much of the pixel at (`x`, `y`) it covers, 0 to 1, by its distance to the outline.
    fn cover(&self, x: f32, y: f32) -> f32 {
        let (u, v) = rotate(x - self.at[0], y - self.at[1], self.turn);
        let (u, v) = (u * self.aspect.sqrt(), v / self.aspect.sqrt());
        let (r, [a, b]) = (self.radius, self.form);
        let from_centre = u.hypot(v);
        let square = |side: f32| (u.abs() - side).max(v.abs() - side);
        // A pattern fills a square or a disc.
        let patch = || edge(if b < 0.5 { square(0.85 * r) } else { from_centre - r });
        match CLASS_NAMES[usize::from(self.label)] {
            "disc" => edge(from_centre - (0.6 + 0.4 * a) * r),
            "ring" => {
                let half = (0.12 + 0.1 * a) * r;
                edge((from_centre - (r - half)).abs() - half)
            }
            "square" => edge(square((0.55 + 0.35 * a) * r)),
            "triangle" => {
                // Three half planes at 120 degrees to each other.
                let side = |k: f32| rotate(u, v, k * TAU / 3.0).1;
                edge(side(0.0).max(side(1.0)).max(side(2.0)) - (0.42 + 0.16 * a) * r)
            }
            "cross" => {
                let arm = (0.14 + 0.16 * a) * r;
                let bar = |along: f32, across: f32| (along.abs() - r).max(across.abs() - arm);
                edge(bar(u, v).min(bar(v, u)))
            }
            "crescent" => {
                let bite = (u - (0.35 + 0.25 * a) * r).hypot(v) - 0.8 * r;
                edge((from_centre - r).max(-bite))
            }
            "pair" => {
                let size = (0.3 + 0.12 * a) * r;
                let disc = |centre: f32| (u - centre).hypot(v) - size;
                edge(disc(0.6 * r).min(disc(-0.6 * r)))
            }
            "stripes" => {
                let width = 2.0 + 1.5 * a;
                patch() * edge(wave(u, width, b))
            }
            "checkers" => {
                let width = 2.2 + 1.6 * a;
                let (p, q) = (wave(u, width, b), wave(v, width, a));
                patch() * edge((p.min(q)).max(-p.max(q)))
            }
            "spiral" => {
                // Archimedes' spiral: the distance between its arms is the same everywhere.
                let pitch = (0.45 + 0.2 * a) * r;
                let hand = if b < 0.5 { 1.0 } else { -1.0 };
                let arm = (from_centre / pitch - hand * v.atan2(u) / TAU).rem_euclid(1.0) - 0.5;
                edge((arm.abs() - 0.25) * pitch) * edge(from_centre - r)
            }
            _ => unreachable!("every class has a shape"),
        }
    }
}

/// Distance to the nearest edge of stripes that are `width` wide, negative inside, moved by `phase` periods.
fn wave(x: f32, width: f32, phase: f32) -> f32 {
    ((x / (2.0 * width) + phase).rem_euclid(1.0) - 0.5).abs() * 2.0 * width - width / 2.0
}

#[cfg(test)]
mod tests {
    use super::super::cifar10::PIXELS;
    use super::*;

    #[test]
    fn every_class_paints_some_of_the_picture_and_not_all() {
        for label in 0..CLASSES as u8 {
            for index in 0..50 {
                let shape = Shape::random(label, &mut stream(0, Purpose::Example, u64::from(label), index));
                let mut canvas = [[0.0; CHANNELS]; SIDE * SIDE];
                paint(&mut canvas, |x, y| ([1.0; CHANNELS], shape.cover(x, y)));
                let area: f32 = canvas.iter().map(|c| c[0]).sum();
                assert!((15.0..600.0).contains(&area), "{} {index}: {area}", CLASS_NAMES[usize::from(label)]);
            }
        }
    }

    #[test]
    fn pixels_depend_on_the_stream_alone() {
        let picture = |index| {
            let mut pixels = [0; PIXELS];
            draw(3, &mut stream(0, Purpose::Picture, 0, index), &mut pixels);
            pixels
        };
        assert_eq!(picture(4), picture(4));
        assert_ne!(picture(4), picture(5));
    }
}
