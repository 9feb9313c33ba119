//! Level 5. Random flips, shifts and holes, and where they put an image.

use std::ops::Range;

use rand::RngExt;
use serde::{Deserialize, Deserializer, Serialize};

use super::view::View;
use crate::error::{Error, Result};
use crate::random::{Purpose, stream};

/// Random changes to training images that keep their class.
///
/// The image is normalised, mirrored, moved to a random place (He et al. 2016, section 4.2) and has a hole cut into it, in
/// this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Augment {
    /// Which images are mirrored left to right. Checkpoints of before there were several ways say `true` or `false`.
    #[serde(deserialize_with = "flip_or_bool")]
    pub flip: Flip,
    /// Shift by up to this many pixels up or down, and left or right.
    pub shift: usize,
    /// What shows where a shift has moved the image away.
    #[serde(default)]
    pub fill: Fill,
    /// Side of a square of zeros, in pixels, with its centre anywhere in the image (DeVries and Taylor 2017, arXiv
    /// 1708.04552); 0 for none.
    #[serde(default)]
    pub cutout: usize,
}

/// Which images of an epoch are mirrored left to right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flip {
    /// None of them.
    #[default]
    None,
    /// Half of them, others in every epoch.
    Random,
    /// Half of them in the first epoch, the other half in the second, and so on by turns: two epochs show every image both
    /// ways (Jordan 2024, arXiv 2404.00498).
    Alternating,
}

/// What shows where an image was moved away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fill {
    /// Zeros, which the mean image has become.
    #[default]
    Zeros,
    /// The image again, mirrored at its border without repeating the border.
    Reflect,
}

/// A [`Flip`], or what there was before it.
fn flip_or_bool<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Flip, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Now(Flip),
        Before(bool),
    }
    Ok(match Written::deserialize(from)? {
        Written::Now(flip) => flip,
        Written::Before(true) => Flip::Random,
        Written::Before(false) => Flip::None,
    })
}

impl Augment {
    /// No changes, which is the default.
    pub const NONE: Self = Augment { flip: Flip::None, shift: 0, fill: Fill::Zeros, cutout: 0 };

    /// Whether some of an image `[C, H, W]` is always left to see.
    pub(crate) fn check(&self, [_, height, width]: [usize; 3]) -> Result<()> {
        let shortest = height.min(width);
        let refused = |what: String| {
            let problem = format!("{what} an image of {width}x{height} pixels out of sight");
            Err(Error::invalid("augmentation", problem, format!("give less than {shortest}")))
        };
        if self.shift >= shortest {
            return refused(format!("a shift by {} pixels can push", self.shift));
        }
        if self.cutout >= shortest {
            return refused(format!("a cutout of {} pixels can take", self.cutout));
        }
        Ok(())
    }

    /// What happens to image `index`, of size `[C, H, W]`, in this epoch. Every number is drawn whether it is used or not,
    /// so that flipping does not change the shifts.
    pub(super) fn draw(&self, [_, height, width]: [usize; 3], seed: u64, epoch: u64, index: usize) -> Placement {
        let of_epoch = |epoch| stream(seed, Purpose::Augment, epoch, index as u64);
        let mut rng = of_epoch(epoch);
        let coin = rng.random_bool(0.5);
        let mirrored = match self.flip {
            Flip::None => false,
            Flip::Random => coin,
            Flip::Alternating => of_epoch(0).random_bool(0.5) ^ (epoch % 2 == 1),
        };
        let mut move_by = || rng.random_range(0..=2 * self.shift) as isize - self.shift as isize;
        let (down, right) = (move_by(), move_by());
        let mut cut = |len: usize| {
            let (centre, before) = (rng.random_range(0..len), self.cutout / 2);
            centre.saturating_sub(before)..(centre + self.cutout - before).min(len)
        };
        let (rows, columns) = (cut(height), cut(width));
        Placement { view: View { mirrored, down, right }, fill: self.fill, rows, columns }
    }
}

impl Fill {
    /// The pixel of a line of `len` that shows at place `at` of it, if one does: at most `len - 1` outside.
    #[inline(always)]
    pub(super) fn source(self, at: isize, len: usize) -> Option<usize> {
        match self {
            Fill::Zeros => usize::try_from(at).ok().filter(|&at| at < len),
            Fill::Reflect => {
                let at = at.unsigned_abs();
                Some(at.min(2 * (len - 1) - at))
            }
        }
    }
}

/// How an image is shown, and a hole in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) view: View,
    pub(super) fill: Fill,
    /// Of the hole.
    pub(super) rows: Range<usize>,
    /// Of the hole.
    pub(super) columns: Range<usize>,
}

impl From<View> for Placement {
    fn from(view: View) -> Self {
        Placement { view, fill: Fill::Reflect, rows: 0..0, columns: 0..0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_before_is_read() {
        let read = |text: &str| serde_json::from_str::<Augment>(text);
        let random = Augment { flip: Flip::Random, shift: 4, ..Augment::NONE };
        assert_eq!(read(r#"{"flip":true,"shift":4}"#).unwrap(), random);
        assert_eq!(read(r#"{"flip":false,"shift":0}"#).unwrap(), Augment::default());
        assert_eq!(Augment::NONE, Augment::default());
        let all = Augment { flip: Flip::Alternating, shift: 2, fill: Fill::Reflect, cutout: 8 };
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(text, r#"{"flip":"alternating","shift":2,"fill":"reflect","cutout":8}"#);
        assert_eq!(read(&text).unwrap(), all);
        assert!(read(r#"{"flip":"sometimes","shift":4}"#).is_err());
    }

    #[test]
    fn holes_have_their_centres_everywhere_and_end_at_the_border() {
        let (height, width) = (7, 5);
        for side in 1..5 {
            let augment = Augment { cutout: side, ..Augment::NONE };
            augment.check([3, height, width]).unwrap();
            let mut seen = std::collections::BTreeSet::new();
            for index in 0..2000 {
                let Placement { rows, columns, .. } = augment.draw([3, height, width], 1, 0, index);
                assert!(rows.end <= height && columns.end <= width);
                seen.insert([rows.start, rows.end, columns.start, columns.end]);
            }
            let lines = |len: usize| {
                (0..len).map(move |centre| {
                    let start = centre as isize - side as isize / 2;
                    [start.max(0) as usize, ((start + side as isize) as usize).min(len)]
                })
            };
            let all = lines(height).flat_map(|[top, bottom]| lines(width).map(move |[l, r]| [top, bottom, l, r]));
            assert_eq!(seen, all.collect(), "side {side}");
        }
        let error = Augment { cutout: 5, ..Augment::NONE }.check([3, height, width]).unwrap_err().to_string();
        assert!(error.contains("cutout of 5 pixels") && error.contains("less than 5"), "{error}");
    }

    #[test]
    fn a_hole_changes_no_other_number() {
        let augment = Augment { flip: Flip::Random, shift: 3, ..Augment::NONE };
        for index in 0..20 {
            let without = augment.draw([1, 9, 9], 5, 2, index);
            assert!(without.rows.is_empty() && without.columns.is_empty());
            let with = Augment { cutout: 4, ..augment }.draw([1, 9, 9], 5, 2, index);
            assert_eq!(with.view, without.view);
        }
    }

    #[test]
    fn reflection_does_not_repeat_the_border() {
        let line: Vec<_> = (-3..7).map(|at| Fill::Reflect.source(at, 4).unwrap()).collect();
        assert_eq!(line, [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]);
        assert_eq!(Fill::Reflect.source(0, 1), Some(0));
        assert_eq!([-1, 0, 3, 4].map(|at| Fill::Zeros.source(at, 4)), [None, Some(0), Some(3), None]);
    }
}
