//! Level 5. From a picture's file to pixels of the size that a network takes: the one way to do it, for training and for
//! prediction.

use std::fs::File;
use std::io::{Cursor, ErrorKind, Read};
use std::path::Path;

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::error::ImageError;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use crate::error::{Error, Result};

/// What makes pixels of a file. What was made by another is made anew: change this with the crates or with the code below.
pub(super) const DECODER: &str = "image 0.25.10, fast_image_resize 6.1.0, 1";
/// How pictures get their size, in words.
pub(super) const RESIZE: &str = "the largest part from the middle that has the shape, bilinear with antialiasing";
/// Bytes that a file may have, and that decoding it may take: 130 megapixels with four bytes each.
const MOST: u64 = 512 << 20;
const FIX: &str = "give a whole JPEG, PNG, WebP or BMP picture";

/// Width and height of a picture as it is to be seen, from the head of its file.
///
/// # Errors
/// As [`read_picture`].
pub(super) fn dimensions(path: &Path) -> Result<(u32, u32)> {
    use image::metadata::Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let mut decoder = decoder(path)?;
    let (width, height) = decoder.dimensions();
    let turned = matches!(decoder.orientation(), Ok(Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH));
    Ok(if turned { (height, width) } else { (width, height) })
}

/// The pixels `dim = (C, H, W)` of a JPEG, PNG, WebP or BMP file of any size and colours, for `C` of 1 or 3.
///
/// It is turned as its EXIF orientation says. Of it, the largest part from the middle that has the shape of `dim` is resized,
/// bilinearly with antialiasing. Transparency is left out, grey is all three colours at once, and the grey of a colour is its
/// luma (ITU-R BT.601), rounded as Pillow does for mode `L`.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Data`] if it is no whole picture, or one of more than 130 megapixels, or
/// if `C` is neither 1 nor 3.
pub fn read_picture(path: &Path, dim: [usize; 3]) -> Result<Vec<u8>> {
    let [channels, height, width] = dim;
    if channels != 1 && channels != 3 {
        let problem = format!("has grey or coloured pixels, the network takes {channels} channels");
        return Err(Error::data(path, problem, "use the library: gemmnet::data::Normalizer::apply takes any number"));
    }
    let mut decoder = decoder(path)?;
    let orientation = decoder.orientation().map_err(|e| unreadable(path, e))?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|e| unreadable(path, e))?;
    picture.apply_orientation(orientation);
    let resized = resize(path, &picture.into_rgb8(), width, height)?;
    Ok(planes(resized.pixels(), channels))
}

/// Reads the head of a file, whatever the ending of its name says.
fn decoder(path: &Path) -> Result<impl ImageDecoder> {
    let failed = |e| Error::io("read", path, e, FIX);
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MOST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST {
        return Err(Error::data(path, format!("has more than {} MB", MOST >> 20), "scale it down, or remove it"));
    }
    // What is missing of a JPEG picture, its decoder fills with grey.
    if image::guess_format(&bytes).is_ok_and(|format| format == ImageFormat::Jpeg) && !has_end(&bytes) {
        return Err(Error::data(path, "is no picture that can be read (the end of the JPEG file is missing)", FIX));
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(failed)?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| unreadable(path, e))?;
    let (width, height) = decoder.dimensions();
    // Not every decoder keeps to its limits.
    if width == 0 || height == 0 || u64::from(width) * u64::from(height) * 4 > MOST {
        let fix = "scale it down, or remove it";
        return Err(Error::data(path, format!("has {width}x{height} pixels, which cannot be taken"), fix));
    }
    Ok(decoder)
}

/// Whether a JPEG file goes on to its end marker.
fn has_end(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        // In the data of a scan, a byte of 255 is followed by a 0, and there are restart markers.
        let is_marker = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7 | 0xff);
        let Some(at) = rest.windows(2).position(is_marker) else { return false };
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        if marker == 0xd9 {
            return true;
        }
        // Others come with a length, which counts its own two bytes.
        let [high, low, ..] = rest else { return false };
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        let Some(after) = rest.get(len..) else { return false };
        rest = after;
    }
}

fn unreadable(path: &Path, error: ImageError) -> Error {
    match error {
        ImageError::IoError(e) if !matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            Error::io("read", path, e, FIX)
        }
        e => {
            let reason = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            Error::data(path, format!("is no picture that can be read ({reason})"), FIX)
        }
    }
}

/// The picture in `width * height` pixels.
fn resize(path: &Path, picture: &RgbImage, width: usize, height: usize) -> Result<TypedImage<'static, U8x3>> {
    let options =
        ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).fit_into_destination(None);
    let failed = |e: &dyn std::error::Error| Error::data(path, format!("cannot be resized ({e})"), FIX);
    let sizes = [width, height].map(u32::try_from);
    let [Ok(width), Ok(height)] = sizes else {
        return Err(Error::data(path, format!("cannot have {width}x{height} pixels"), "ask for fewer"));
    };
    // Of known type: where it is found at run time, resizing is compiled into this crate for every type of pixels.
    let from = TypedImageRef::<U8x3>::from_buffer(picture.width(), picture.height(), picture.as_raw());
    let from = from.map_err(|e| failed(&e))?;
    let mut to = TypedImage::<U8x3>::new(width, height);
    Resizer::new().resize_typed(&from, &mut to, &options).map_err(|e| failed(&e))?;
    Ok(to)
}

/// The `channels` planes, one or three, of pixels of red, green and blue.
fn planes(pixels: &[U8x3], channels: usize) -> Vec<u8> {
    let luma = |pixel: &U8x3| {
        let [red, green, blue] = pixel.0.map(u32::from);
        ((19_595 * red + 38_470 * green + 7_471 * blue + (1 << 15)) >> 16) as u8
    };
    if channels == 1 {
        return pixels.iter().map(luma).collect();
    }
    (0..channels).flat_map(|channel| pixels.iter().map(move |pixel| pixel.0[channel])).collect()
}

#[cfg(test)]
mod tests {
    use image::metadata::Orientation;
    use image::{DynamicImage, GrayAlphaImage, GrayImage, RgbaImage};

    use super::*;

    /// Sample `s` of pixel `i`.
    fn value(i: usize, s: usize) -> u8 {
        (i * 7 + s * 50) as u8
    }

    #[test]
    fn files_of_every_colour_type_become_planes() {
        let dir = tempfile::tempdir().unwrap();
        let (height, width) = (5, 7);
        for samples in [1, 2, 3, 4] {
            let bytes: Vec<u8> = (0..height * width).flat_map(|i| (0..samples).map(move |s| value(i, s))).collect();
            let (w, h) = (width as u32, height as u32);
            let picture: DynamicImage = match samples {
                1 => GrayImage::from_raw(w, h, bytes).unwrap().into(),
                2 => GrayAlphaImage::from_raw(w, h, bytes).unwrap().into(),
                3 => RgbImage::from_raw(w, h, bytes).unwrap().into(),
                _ => RgbaImage::from_raw(w, h, bytes).unwrap().into(),
            };
            for ending in ["png", "webp", "bmp"] {
                let path = dir.path().join(format!("picture.{ending}"));
                // WebP and BMP know no grey with transparency.
                let picture = if samples == 2 && ending != "png" { picture.to_rgba8().into() } else { picture.clone() };
                picture.save(&path).unwrap();
                let grey = read_picture(&path, [1, height, width]).unwrap();
                let colours = read_picture(&path, [3, height, width]).unwrap();
                assert_eq!((grey.len(), colours.len()), (height * width, 3 * height * width));
                check_planes(&grey, &colours, samples);
            }
        }
    }

    /// Planes of pixels with so many samples each.
    fn check_planes(grey: &[u8], colours: &[u8], samples: usize) {
        for (i, &grey_pixel) in grey.iter().enumerate() {
            for channel in 0..3 {
                let sample = if samples < 3 { 0 } else { channel };
                assert_eq!(colours[channel * grey.len() + i], value(i, sample), "{samples} samples");
            }
            let [red, green, blue] = [0, 1, 2].map(|s| f64::from(value(i, s)));
            let luma = (0.299 * red + 0.587 * green + 0.114 * blue).round() as u8;
            assert_eq!(grey_pixel, if samples < 3 { value(i, 0) } else { luma }, "{samples} samples");
        }
    }

    /// A black picture with a white left half; as JPEG, whose blocks are 8x8, with an EXIF orientation put in.
    fn half_white(orientation: u8) -> Vec<u8> {
        let picture = RgbImage::from_fn(48, 32, |x, _| image::Rgb([if x < 24 { 255 } else { 0 }; 3]));
        let mut jpeg = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
        let jpeg = jpeg.into_inner();
        // APP1: its length, "Exif", a TIFF header, one entry: orientation (0x0112), a short, one of them.
        let tiff = [b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".as_slice(), &[orientation], &[0; 6]].concat();
        let app1 = [&[0xff, 0xe1, 0, (2 + 6 + tiff.len()) as u8], b"Exif\0\0".as_slice(), &tiff].concat();
        [&jpeg[..2], &app1, &jpeg[2..]].concat()
    }

    #[test]
    fn pictures_stand_as_their_exif_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("turned.jpg");
        // Where the white half is: left, right, right, left, then in what became a column: top, top, bottom, bottom.
        let sides = ["left", "right", "right", "left", "top", "top", "bottom", "bottom"];
        for (orientation, side) in (1..=8).zip(sides) {
            std::fs::write(&path, half_white(orientation)).unwrap();
            assert!(Orientation::from_exif(orientation).is_some());
            let turned = orientation > 4;
            assert_eq!(dimensions(&path).unwrap(), if turned { (32, 48) } else { (48, 32) });
            let pixels = read_picture(&path, [1, 8, 8]).unwrap();
            let [left, right] = [0, 7].map(|x| pixels[4 * 8 + x] > 128);
            let [top, bottom] = [0, 7].map(|y| pixels[y * 8 + 4] > 128);
            let seen = match [left, right, top, bottom] {
                [true, false, ..] => "left",
                [false, true, ..] => "right",
                [_, _, true, false] => "top",
                _ => "bottom",
            };
            assert_eq!(seen, side, "orientation {orientation}: {pixels:?}");
        }
    }

    /// The middle is taken, and what is smaller than a pixel of the result is averaged, not dropped.
    #[test]
    fn the_middle_is_resized_with_antialiasing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wide.png");
        // Columns in turn black and white, in the middle; red at the sides.
        let picture = RgbImage::from_fn(192, 64, |x, _| match x {
            64..128 => image::Rgb([if x % 2 == 0 { 0 } else { 255 }; 3]),
            _ => image::Rgb([255, 0, 0]),
        });
        picture.save(&path).unwrap();
        let pixels = read_picture(&path, [3, 8, 8]).unwrap();
        // At the border a little of what is beside it shows, as if the whole were resized first.
        let inner = pixels.chunks_exact(8).flat_map(|row| &row[1..7]);
        assert!(inner.clone().all(|pixel| (126..=129).contains(pixel)), "{pixels:?}");
        assert!(pixels.iter().all(|pixel| (100..=155).contains(pixel)), "{pixels:?}");
    }

    #[test]
    fn what_is_broken_is_an_error_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let picture = RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, (x * y) as u8]));
        for ending in ["jpg", "png", "webp", "bmp"] {
            let path = dir.path().join(format!("picture.{ending}"));
            picture.save(&path).unwrap();
            let whole = std::fs::read(&path).unwrap();
            read_picture(&path, [3, 16, 16]).unwrap();
            let mut taken = Vec::new();
            // The last 12 bytes of a PNG file only say that it ends.
            for len in (0..whole.len() - 12).step_by(7) {
                std::fs::write(&path, &whole[..len]).unwrap();
                match read_picture(&path, [3, 16, 16]) {
                    Ok(_) => taken.push(len),
                    Err(e) => {
                        assert!(!e.to_string().contains('\n') && e.to_string().contains("give a whole JPEG"), "{e}")
                    }
                }
            }
            assert!(
                taken.is_empty(),
                "{ending}: of {} bytes, these many were taken for a picture: {taken:?}",
                whole.len()
            );
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 0xff;
                std::fs::write(&path, bytes).unwrap();
                if let Err(e) = read_picture(&path, [3, 16, 16]) {
                    assert!(!e.to_string().contains('\n'), "{e}");
                }
            }
        }
        let path = dir.path().join("huge.bmp");
        image::RgbImage::new(1, 1).save(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[18..22].copy_from_slice(&60_000_i32.to_le_bytes());
        bytes[22..26].copy_from_slice(&60_000_i32.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let message = read_picture(&path, [3, 16, 16]).unwrap_err().to_string();
        assert!(message.contains("60000x60000") && message.contains("scale it down"), "{message}");
    }
}
