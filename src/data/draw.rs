//! Level 5. What a batch is drawn from, and how its images are changed.

use super::augment::{Augment, Placement};
use super::source::Split;
use super::view::View;
use crate::error::Result;

/// What a batch is drawn from, and how its images are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The split.
    pub split: Split,
    /// What happens to every image of the batch.
    pub change: Change,
}

/// What happens to an image once it is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Random changes, which are others for every image, seed and epoch.
    Random {
        /// Which they may be.
        augment: Augment,
        /// Of the random numbers.
        seed: u64,
        /// From 0.
        epoch: u64,
    },
    /// It is shown in this way.
    View(View),
}

impl Draw {
    /// Images of `split` as they are.
    pub fn plain(split: Split) -> Self {
        Self::view(split, View::PLAIN)
    }

    /// Images of `split` with random changes, if any.
    pub fn augmented(split: Split, augment: Option<Augment>, seed: u64, epoch: u64) -> Self {
        let random = |augment| Draw { split, change: Change::Random { augment, seed, epoch } };
        augment.map_or(Self::plain(split), random)
    }

    /// Images of `split`, each shown in the same way.
    pub fn view(split: Split, view: View) -> Self {
        Draw { split, change: Change::View(view) }
    }
}

impl Change {
    /// Whether it can happen to images `[C, H, W]`.
    pub(super) fn check(&self, dim: [usize; 3]) -> Result<()> {
        match self {
            Change::Random { augment, .. } => augment.check(dim),
            Change::View(view) => view.check(dim),
        }
    }

    /// What happens to image `index`, of size `[C, H, W]`.
    pub(super) fn placement(&self, dim: [usize; 3], index: usize) -> Placement {
        match *self {
            Change::Random { augment, seed, epoch } => augment.draw(dim, seed, epoch, index),
            Change::View(view) => view.into(),
        }
    }
}
