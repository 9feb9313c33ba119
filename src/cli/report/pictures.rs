//! Level 7. Pictures within the page: PNG files as addresses that hold the data themselves.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage, Rgba, RgbaImage};

use super::data::Filters;

/// Filters on a sheet.
const MOST_FILTERS: usize = 256;
/// Pixels of a filter, about; its weights are squares.
const SIDE: usize = 24;
const GAP: usize = 3;
/// Of what is right and what is wrong; the page behind shines through where there is little of it.
const RIGHT: [u8; 3] = [0x2b, 0x86, 0xc4];
const WRONG: [u8; 3] = [0xe0, 0x6c, 0x1f];

/// An image `(C, H, W)` of one channel or three; of others the first is shown.
pub(in crate::cli) fn picture(dim: [usize; 3], pixels: &[u8]) -> String {
    let [channels, height, width] = dim;
    assert_eq!(pixels.len(), channels * height * width, "an image of the size said");
    let (wide, high, plane) = (width as u32, height as u32, height * width);
    let at = |channel: usize, x: u32, y: u32| pixels[channel * plane + y as usize * width + x as usize];
    uri(&match channels {
        3 => RgbImage::from_fn(wide, high, |x, y| [0, 1, 2].map(|channel| at(channel, x, y)).into()).into(),
        _ => GrayImage::from_fn(wide, high, |x, y| [at(0, x, y)].into()).into(),
    })
}

/// The first filters side by side, and the sheet's width in pixels. Of three channels they are in colour, of others the
/// first is shown. Grey is 0, the largest weight of a filter fills the range.
pub(super) fn contact_sheet(filters: &Filters) -> (String, u32) {
    let [count, channels, height, width] = filters.shape;
    assert_eq!(filters.values.len(), count * channels * height * width, "filters of the shape said");
    let shown = count.min(MOST_FILTERS);
    let across = if shown > 32 { 16 } else { 8 }.min(shown);
    let zoom = (SIDE / height.max(width)).max(1);
    let place = |index: usize, side: usize| (index * (side * zoom + GAP)) as u32;
    let size = |count: usize, side: usize| place(count, side).saturating_sub(GAP as u32);
    let mut sheet = RgbaImage::new(size(across, width), size(shown.div_ceil(across), height));
    for (index, filter) in filters.values.chunks(channels * height * width).take(shown).enumerate() {
        let corner = (place(index % across, width), place(index / across, height));
        let most = filter.iter().fold(0.0, |most: f32, weight| most.max(weight.abs()));
        let shade = |weight: f32| (128.0 + 127.0 * weight / most.max(f32::MIN_POSITIVE)) as u8;
        let (wide, high) = ((width * zoom) as u32, (height * zoom) as u32);
        for (x, y) in (0..high).flat_map(|y| (0..wide).map(move |x| (x, y))) {
            let from = y as usize / zoom * width + x as usize / zoom;
            let value = |channel: usize| shade(filter[if channels == 3 { channel } else { 0 } * height * width + from]);
            sheet.put_pixel(corner.0 + x, corner.1 + y, Rgba([value(0), value(1), value(2), 255]));
        }
    }
    let wide = sheet.width();
    (uri(&sheet.into()), wide)
}

/// A pixel for each pair of classes, as strong as its share `(classes, classes)` of the row; the root of it, because single
/// mistakes would be too pale.
pub(super) fn heat_map(shares: &[Vec<f64>]) -> String {
    let side = shares.len() as u32;
    let pixel = |x: u32, y: u32| {
        let share = shares[y as usize].get(x as usize).copied().unwrap_or(0.0);
        let [r, g, b] = if x == y { RIGHT } else { WRONG };
        Rgba([r, g, b, (255.0 * share.clamp(0.0, 1.0).sqrt()) as u8])
    };
    uri(&RgbaImage::from_fn(side, side, pixel).into())
}

fn uri(image: &DynamicImage) -> String {
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).expect("memory takes all that is written");
    format!("data:image/png;base64,{}", STANDARD.encode(png.get_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(uri: &str) -> DynamicImage {
        let data = STANDARD.decode(uri.strip_prefix("data:image/png;base64,").expect("a PNG")).expect("base64");
        image::load_from_memory_with_format(&data, ImageFormat::Png).expect("a picture")
    }

    #[test]
    fn pixels_come_back_as_they_were() {
        let pixels: Vec<u8> = (0..24).map(|i| i * 10).collect();
        let colour = decoded(&picture([3, 2, 4], &pixels)).into_rgb8();
        assert_eq!((colour.dimensions(), colour.get_pixel(1, 1).0), ((4, 2), [50, 130, 210]));
        for channels in [1, 2, 4] {
            let grey = decoded(&picture([channels, 24 / channels / 2, 2], &pixels));
            assert_eq!((grey.color(), grey.to_luma8().get_pixel(1, 1).0), (image::ColorType::L8, [30]));
        }
    }

    #[test]
    fn zero_is_grey_and_the_largest_weight_is_white_or_black() {
        let mut values = vec![0.0; 3 * 9];
        (values[0], values[9], values[18]) = (0.5, -0.5, f32::NAN);
        let (sheet, width) = contact_sheet(&Filters { shape: [1, 3, 3, 3], values });
        let sheet = decoded(&sheet).into_rgba8();
        assert_eq!((sheet.dimensions(), width), ((24, 24), 24));
        assert_eq!((sheet.get_pixel(0, 0).0, sheet.get_pixel(23, 23).0), ([255, 1, 0, 255], [128, 128, 128, 255]));
    }

    #[test]
    fn odd_filters_have_a_sheet() {
        for shape in [[300, 1, 1, 1], [64, 3, 7, 7], [40, 4, 31, 31], [5, 3, 3, 5], [1, 1, 3, 3]] {
            let values = vec![0.0; shape.iter().product()];
            let (sheet, width) = contact_sheet(&Filters { shape, values });
            assert_eq!(decoded(&sheet).width(), width, "{shape:?}");
        }
    }
}
