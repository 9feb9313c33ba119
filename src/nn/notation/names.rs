//! Level 5. The names of layers, and the nearest one to a word that is none.

use crate::nn::layers;
use crate::ops::activation::Activation;

/// Every name but those of the activations and of the layers that are no parts of blocks.
pub(super) const NAMES: [&str; 15] = [
    "conv",
    "whiten",
    "pool",
    "maxpool",
    "avgpool",
    "gap",
    "affine",
    "fc",
    "linear",
    "bn",
    "batchnorm",
    "dropout",
    "res",
    "softmax",
    "svm",
];

/// Every name.
pub(super) fn all() -> impl Iterator<Item = &'static str> {
    let others = layers::BUILT_IN.iter().map(|layer| layer.name);
    NAMES.into_iter().chain(Activation::NAMES.map(|(name, _)| name)).chain(others)
}

/// The name that is most like `word`, if it is like it at all.
pub(super) fn nearest(word: &str) -> Option<&'static str> {
    let nearest = all().min_by_key(|known| edits(word, known))?;
    (edits(word, nearest) <= nearest.len() / 2).then_some(nearest)
}

/// Levenshtein distance: the fewest letters to insert, delete or replace to make `b` of `a`.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
