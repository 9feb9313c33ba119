//! Level 5. Random flips and shifts.

use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::random::{Purpose, stream};

/// Random changes to training images that keep their class.
///
/// The image is normalised, mirrored, padded with zeros (which the mean image has become) and cropped at a random place,
/// in this order (He et al. 2016, section 4.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Augment {
    /// Mirror every second image left to right.
    pub flip: bool,
    /// Shift by up to this many pixels up or down, and left or right.
    pub shift: usize,
}

impl Augment {
    /// Whether some of an image `[C, H, W]` is always left to see.
    pub(super) fn check(&self, [_, height, width]: [usize; 3]) -> Result<()> {
        let shortest = height.min(width);
        if self.shift < shortest {
            return Ok(());
        }
        let problem =
            format!("a shift by {} pixels can push an image of {width}x{height} pixels out of sight", self.shift);
        Err(Error::invalid("augmentation", problem, format!("give less than {shortest}")))
    }

    /// What happens to image `index` in this epoch. Every number is drawn whether it is used or not, so that flipping
    /// does not change the shifts.
    pub(super) fn draw(&self, seed: u64, epoch: u64, index: usize) -> Placement {
        let mut rng = stream(seed, Purpose::Augment, epoch, index as u64);
        let mirrored = rng.random_bool(0.5);
        let mut move_by = || rng.random_range(0..=2 * self.shift) as isize - self.shift as isize;
        let (down, right) = (move_by(), move_by());
        Placement { mirrored: self.flip && mirrored, down, right }
    }
}

/// Where the image lands: mirrored or not, then moved by so many pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) mirrored: bool,
    pub(super) down: isize,
    pub(super) right: isize,
}

impl Placement {
    pub(super) const CENTRED: Self = Placement { mirrored: false, down: 0, right: 0 };
}
