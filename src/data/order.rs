//! Level 5. Which samples make up the batches of an epoch.

use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::random::{Purpose, stream};

/// How an epoch is cut into batches: `count` full ones, as in CS231n's `num_train // batch_size`, at least one.
///
/// What is left over is not trained on in that epoch: a short batch would have a noisier gradient at the same learning
/// rate, and a shape of its own. Shuffling leaves over other samples each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batches {
    /// Samples to choose from.
    pub samples: usize,
    /// Samples in a batch: as asked for, but no more than there are.
    pub size: usize,
    /// Batches in an epoch.
    pub count: usize,
}

impl Batches {
    /// Batches of `size` from `samples` samples.
    ///
    /// # Errors
    /// [`Error::Invalid`] if either is 0.
    pub fn new(samples: usize, size: usize) -> Result<Self> {
        if size == 0 {
            return Err(Error::invalid("batch size", "a batch of 0 images teaches nothing", "give 1 or more"));
        }
        if samples == 0 {
            return Err(Error::invalid("training split", "it has 0 images", "give it 1 or more"));
        }
        let size = size.min(samples);
        Ok(Batches { samples, size, count: samples / size })
    }
}

/// How the samples of an epoch are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// A new permutation in every epoch: no sample twice.
    #[default]
    ShuffledEpochs,
    /// Every batch on its own, uniformly with replacement, as CS231n does.
    WithReplacement,
}

impl Sampler {
    /// Fills `order` with the samples of epoch `epoch`: `batches.count` times `batches.size` indices below
    /// `batches.samples`, batch after batch. It depends on nothing but the arguments.
    pub fn order(self, batches: Batches, seed: u64, epoch: u64, order: &mut Vec<usize>) {
        order.clear();
        match self {
            Sampler::ShuffledEpochs => {
                order.extend(0..batches.samples);
                let mut rng = stream(seed, Purpose::Shuffle, epoch, 0);
                // Fisher & Yates, in Durstenfeld's form (1964).
                for i in (1..order.len()).rev() {
                    order.swap(i, rng.random_range(0..=i));
                }
                order.truncate(batches.count * batches.size);
            }
            Sampler::WithReplacement => {
                for step in epoch * batches.count as u64..(epoch + 1) * batches.count as u64 {
                    let mut rng = stream(seed, Purpose::Replacement, 0, step);
                    order.extend((0..batches.size).map(|_| rng.random_range(0..batches.samples)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_full_batches_only_and_at_least_one() {
        for (samples, size, count) in [(49_000, 50, 980), (10, 3, 3), (10, 10, 1), (1, 1, 1)] {
            assert_eq!(Batches::new(samples, size).unwrap(), Batches { samples, size, count });
        }
        assert_eq!(Batches::new(7, 50).unwrap(), Batches { samples: 7, size: 7, count: 1 });
        assert!(Batches::new(7, 0).unwrap_err().to_string().contains("batch of 0"));
        assert!(Batches::new(0, 7).unwrap_err().to_string().contains("0 images"));
    }

    #[test]
    fn a_shuffled_epoch_is_a_new_permutation_each_time() {
        let batches = Batches::new(100, 25).unwrap();
        let order = |seed, epoch| {
            let mut order = vec![7; 3];
            Sampler::ShuffledEpochs.order(batches, seed, epoch, &mut order);
            order
        };
        let first = order(1, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(first, order(1, 0));
        assert_ne!(first, order(1, 1));
        assert_ne!(first, order(2, 0));
        // 10 samples, batches of 4: two are left over, no index twice.
        let mut short = Vec::new();
        Sampler::ShuffledEpochs.order(Batches::new(10, 4).unwrap(), 1, 0, &mut short);
        assert_eq!(short.len(), 8);
        short.sort_unstable();
        short.dedup();
        assert_eq!(short.len(), 8);
    }

    /// Protects against an off-by-one of the shuffle, which would favour places.
    #[test]
    fn shuffling_is_uniform() {
        let batches = Batches::new(3, 3).unwrap();
        let mut counts = std::collections::BTreeMap::new();
        let mut order = Vec::new();
        for epoch in 0..6000 {
            Sampler::ShuffledEpochs.order(batches, 3, epoch, &mut order);
            *counts.entry(order.clone()).or_insert(0_usize) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 1000 expected, standard deviation 29.
        assert!(counts.values().all(|&n| (850..1150).contains(&n)), "{counts:?}");
    }

    #[test]
    fn batches_with_replacement_are_independent_of_each_other() {
        let batches = Batches::new(40, 8).unwrap();
        let (mut all, mut second) = (Vec::new(), Vec::new());
        for epoch in 0..200 {
            Sampler::WithReplacement.order(batches, 5, epoch, &mut second);
            assert_eq!(second.len(), 40);
            all.extend_from_slice(&second);
        }
        let mut counts = [0_usize; 40];
        all.iter().for_each(|&i| counts[i] += 1);
        // 200 expected, standard deviation 14.
        assert!(counts.iter().all(|n| (130..270).contains(n)), "{counts:?}");
        assert!(all.chunks_exact(40).any(|epoch| (0..40).any(|i| !epoch.contains(&i))), "some sample is left out");
        assert_ne!(all[..8], all[8..16]);
    }
}
