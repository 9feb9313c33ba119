//! Level 5. Data: sources of images of any size, splits, normalisation, augmentation, batches.
//!
//! A [`Source`] lends labelled images `(C, H, W)` of bytes or floats: [`Cifar10`] from mapped files, [`Arrays`] from
//! memory, [`Pictures`](pictures::Pictures) that are drawn, or one of your own; with the feature `cli` also folders of
//! pictures and other files, in `data::files`. A [`Dataset`] normalises them and fills batches:
//!
//! ```no_run
//! use gemmnet::data::{Augment, Batches, Dataset, Draw, Flip, Normalization, Sampler, Split};
//!
//! let data = Dataset::open("data".as_ref(), Normalization::MeanImage)?;
//! let batches = Batches::new(data.len(Split::Train), 50)?;
//! let augment = Some(Augment { flip: Flip::Random, shift: 4, ..Augment::NONE });
//! let (mut x, mut y, mut order) = (vec![0_f32; batches.size * data.image_len()], vec![0; batches.size], Vec::new());
//! for epoch in 0..10 {
//!     Sampler::ShuffledEpochs.order(batches, 0, epoch, &mut order);
//!     let draw = Draw::augmented(Split::Train, augment, 0, epoch);
//!     for indices in order.chunks_exact(batches.size) {
//!         data.fill_batch(draw, indices, &mut x, &mut y)?;
//!     }
//! }
//! # Ok::<(), gemmnet::Error>(())
//! ```

mod arrays;
mod augment;
pub mod cifar10;
mod dataset;
mod draw;
#[cfg(feature = "cli")]
pub mod fetch;
#[cfg(feature = "cli")]
pub mod files;
mod map;
mod normalize;
mod order;
pub mod pictures;
#[cfg(feature = "cli")]
pub mod places;
mod source;
mod view;

pub use arrays::{Arrays, Labelled};
pub use augment::{Augment, Fill, Flip};
pub use cifar10::Cifar10;
pub use dataset::Dataset;
pub use draw::{Change, Draw};
pub use normalize::{Normalization, Normalizer};
pub use order::{Batches, Sampler};
pub(crate) use source::written;
pub use source::{Image, Pixel, Source, Split};
pub use view::{View, Views};
