//! Level 1. Random streams, keyed so that results depend on the seed alone.
//!
//! Every use has a stream of its own, keyed by (seed, purpose, epoch, index): which thread draws from it, in which
//! order, or whether an evaluation happened in between makes no difference.

use rand::SeedableRng;
pub use rand_chacha::ChaCha8Rng;

/// What a stream is for. The discriminants are part of what a seed means: never renumber them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial weights; index = the parameter's place in the network.
    Init = 1,
    /// The order of the samples in an epoch.
    Shuffle = 2,
    /// Batches drawn with replacement; index = the batch.
    Replacement = 3,
    /// Augmentation; index = the sample.
    Augment = 4,
    /// Dropout masks; epoch = the training step, index = the layer and the sample.
    Dropout = 5,
    /// Pictures of the built-in data set; index = the sample.
    Picture = 6,
    /// Samples on which the training accuracy is measured.
    Measure = 7,
    /// Inputs of tests and benches.
    Example = 8,
    /// Which images of a data set without splits are held out; index = the image.
    HoldOut = 9,
    /// Recipes that a search tries; index = the trial.
    Trial = 10,
}

/// The stream of (seed, purpose, epoch, index): ChaCha with 8 rounds, the four numbers as its 256-bit key.
pub fn stream(seed: u64, purpose: Purpose, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, purpose as u64, epoch, index]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn streams_differ_by_every_part_of_the_key_and_repeat() {
        let first = |s, p, e, i| stream(s, p, e, i).next_u64();
        let base = first(0, Purpose::Init, 0, 0);
        assert_eq!(base, first(0, Purpose::Init, 0, 0));
        for other in [
            first(1, Purpose::Init, 0, 0),
            first(0, Purpose::Shuffle, 0, 0),
            first(0, Purpose::Init, 1, 0),
            first(0, Purpose::Init, 0, 1),
        ] {
            assert_ne!(base, other);
        }
    }
}
