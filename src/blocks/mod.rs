//! Level 4. Blocks: a product and all that follows it, in as few passes over memory as its parts allow.
//!
//! A [`Block`] is `[conv | affine] [early pool] [batchnorm] [activation] [pool] [dropout]`, in this order, each part
//! optional: the cascades of CS231n and every other. How it runs:
//!
//! | block | forward, training | backward |
//! | --- | --- | --- |
//! | conv, no batchnorm, ReLU or leaky ReLU or nothing, no pool or max pool that tiles | each tile of the product gets bias, activation and pool in the cache, and is written once | tiles of the gradient are made from dout, out and the argmax cells on the way into the products |
//! | Winograd's convolution with batchnorm, in `f32`, blocks of 16 filters few of whose places are left over, planes of up to 64x64, no dropout | the product in blocks of channels; sums over slots of images; then block by block normalisation, activation and pool (`training`) | two sums over each channel; then blocks of the gradient are made on the way into the products |
//! | with batchnorm otherwise | product; then channel by channel statistics, normalisation, activation and pool while the channel is in the cache | two sums over each channel; then tiles of the gradient are made on the way into the products. Of small planes, or where the pool does not tile: channel by channel the gradient, in place of the product; then the products' backward |
//! | pool before batchnorm | each tile of the product is pooled in the cache and written once; then as above | as above; tiles of the gradient are made from that of the pooled product and the argmax cells |
//! | anything else | product and bias; then plane by plane the rest | the same in reverse |
//!
//! In test mode every block whose pool (if any) tiles takes the first way: batchnorm is then a scale and a shift per channel. A session
//! may have input and output in blocks of channels (`MemoryFormat` in `ops/layout.rs`), and so may a network in training; a pool that
//! does not tile then follows, in a session, a product that was mapped and activated before it was written (`blocked`).

mod backward;
mod block;
mod blocked;
pub mod cascades;
mod forward;
mod parts;
mod tail;
mod training;

pub use block::{Block, BlockState};
pub use parts::{BlockGrads, BlockInput, BlockParts, Core, Pass, Pool, Prepared, Weights};
