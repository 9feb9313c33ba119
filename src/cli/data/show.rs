//! Level 7. `gemmnet data show`: some images of each class on a sheet.

use std::path::{Path, PathBuf};

use font8x8::{BASIC_FONTS, UnicodeFonts};
use image::{Rgb, RgbImage};
use serde_json::json;

use super::open::{Folder, Wanted, counts, imbalance};
use crate::cli::Stop;
use crate::cli::output::{Output, thousands};
use crate::data::{Image, Source, Split};
use crate::error::{Error, Result};
use crate::store::replace;

/// Images of a class on the sheet.
const ACROSS: usize = 12;
/// Pixels of an image on the sheet, along its longer side: small ones are shown larger, large ones smaller.
const SIDE: usize = 64;
const GAP: usize = 4;
/// Pixels of a letter along each side.
const LETTER: usize = 8;
/// Pixels that the names may take; longer ones are cut.
const WIDEST: usize = 30 * LETTER;
/// Images on a sheet, which else would be too high to look at.
const MOST_CLASSES: usize = 250;
const BLACK: Rgb<u8> = Rgb([0; 3]);
const WHITE: Rgb<u8> = Rgb([255; 3]);

pub(super) fn run(dir: PathBuf, sheet: &Path, out: &Output) -> Result<(), Stop> {
    let folder = Folder::given(dir)?;
    let opened = folder.open(Wanted::default(), out)?;
    let source = &*opened.source;
    source.notes().iter().cloned().chain(imbalance(source)).for_each(|note| out.note(format_args!("note: {note}")));
    let all = Split::ALL.map(|split| counts(source, split));
    let total = |class: usize| all.iter().map(|counts| counts[class]).sum::<usize>();
    let shown = source.class_names().len().min(MOST_CLASSES);
    let lines: Vec<[String; 2]> = (source.class_names()[..shown].iter().enumerate())
        .map(|(class, name)| [name.clone(), format!("{} images", thousands(total(class)))])
        .collect();
    let picture = draw(source, &lines);
    let mut png = std::io::Cursor::new(Vec::new());
    let failed = |e| Error::data(sheet, format!("cannot be made ({e})"), "name another file with --out");
    picture.write_to(&mut png, image::ImageFormat::Png).map_err(failed)?;
    replace(sheet, png.get_ref())?;

    for (class, name) in source.class_names().iter().enumerate() {
        out.line(format_args!("{name}: {} images", thousands(total(class))))?;
    }
    if shown < source.class_names().len() {
        out.note(format_args!("note: the sheet shows the first {shown} classes"));
    }
    out.line(format_args!(
        "{}: {}; {} shows some of each class",
        folder.dir.display(),
        folder.format.describe(),
        sheet.display()
    ))?;
    let classes: serde_json::Map<_, _> =
        source.class_names().iter().enumerate().map(|(class, name)| (name.clone(), total(class).into())).collect();
    out.json(&json!({
        "dir": folder.dir.display().to_string(),
        "format": folder.format.describe(),
        "sheet": sheet.display().to_string(),
        "width": picture.width(),
        "height": picture.height(),
        "classes": classes,
    }))
}

/// A row for each class: two lines of text, and its first training images.
fn draw(source: &dyn Source, lines: &[[String; 2]]) -> RgbImage {
    let [_, height, width] = source.dim();
    let longest = height.max(width);
    let [high, wide] = [height, width].map(|side| (side * SIDE).div_ceil(longest));
    let letters = lines.iter().flatten().map(|line| line.chars().count()).max().unwrap_or(0);
    let text = (letters * LETTER).min(WIDEST);
    let row = high.max(3 * LETTER) + GAP;
    let size = [text + 2 * GAP + ACROSS * (wide + GAP), lines.len() * row + GAP];
    let mut sheet = RgbImage::from_pixel(size[0] as u32, size[1] as u32, WHITE);
    for (class, [name, count]) in lines.iter().enumerate() {
        write(&mut sheet, GAP, GAP + class * row, name);
        write(&mut sheet, GAP, GAP + class * row + LETTER + GAP, count);
    }
    let mut drawn = vec![0; lines.len()];
    for index in 0..source.len(Split::Train) {
        let (image, class) = source.image(Split::Train, index);
        let Some(drawn) = drawn.get_mut(class).filter(|drawn| **drawn < ACROSS) else { continue };
        let corner = [text + 2 * GAP + *drawn * (wide + GAP), GAP + class * row];
        place(&mut sheet, corner, [high, wide], image, source.dim());
        *drawn += 1;
    }
    sheet
}

/// Draws an image, each pixel of the sheet from the nearest of the image's.
fn place(sheet: &mut RgbImage, [left, top]: [usize; 2], [high, wide]: [usize; 2], image: Image<'_>, dim: [usize; 3]) {
    let [channels, height, width] = dim;
    let bytes = as_bytes(image);
    for y in 0..high {
        for x in 0..wide {
            let from = y * height / high * width + x * width / wide;
            // Of other than three channels, the first is shown as grey.
            let value = |channel: usize| bytes[if channels == 3 { channel } else { 0 } * height * width + from];
            sheet.put_pixel((left + x) as u32, (top + y) as u32, Rgb([value(0), value(1), value(2)]));
        }
    }
}

/// Floats fill the range of bytes from the least to the largest of an image.
fn as_bytes(image: Image<'_>) -> Vec<u8> {
    match image {
        Image::Bytes(pixels) => pixels.to_vec(),
        Image::Floats(pixels) => {
            let finite = || pixels.iter().copied().filter(|pixel| pixel.is_finite());
            let (least, most) = (finite().fold(f32::INFINITY, f32::min), finite().fold(f32::NEG_INFINITY, f32::max));
            let range = if most > least { most - least } else { 1.0 };
            pixels.iter().map(|pixel| ((pixel - least) / range * 255.0) as u8).collect()
        }
    }
}

/// Writes a line, letters that the font does not have as a question mark; what does not fit is cut.
fn write(sheet: &mut RgbImage, left: usize, top: usize, text: &str) {
    let glyph = |letter| BASIC_FONTS.get(letter).or_else(|| BASIC_FONTS.get('?')).unwrap_or_default();
    for (place, letter) in text.chars().take(WIDEST / LETTER).enumerate() {
        for (y, bits) in glyph(letter).into_iter().enumerate() {
            for x in (0..LETTER).filter(|x| bits >> x & 1 == 1) {
                sheet.put_pixel((left + place * LETTER + x) as u32, (top + y) as u32, BLACK);
            }
        }
    }
}
