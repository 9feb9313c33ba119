//! Level 5. Inference: a trained network with batchnorm folded into its products, for a fixed batch size.

use std::collections::BTreeSet;

use ndarray::ArrayView4;

use crate::blocks::{Block, BlockParts, Pass, Prepared, Weights};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::nn::formats::block_channels;
use crate::nn::fusion::{Fused, Gathered};
use crate::nn::memory::{Memory, for_inference};
use crate::nn::network::Network;
use crate::nn::run::Run;
use crate::nn::steps::{Kernel, Step};
use crate::ops::layout::row_major;
use crate::parallel::{current_threads, together};
use crate::profile::Phase;
use crate::shape::check_elements;
use crate::workspace::Buffer;

/// A network for inference. It is immutable, so any number of threads may share it; each brings a [`SessionScratch`].
///
/// Batchnorm after a product is folded into it: with running mean `m` and variance `v` and `s = gamma / sqrt(v + eps)`,
/// `w' = s w` and `b' = beta + s (b - m)`. Weights are prepared once, values that do not live at the same time share their
/// memory, and a call allocates nothing. In `f32`, what lies between convolutions lies in blocks of 16 channels
/// (`[N, C / 16, H, W, 16]`) wherever all who read it can take it so; images and scores lie as ever.
///
/// ```
/// # use gemmnet::nn::{init::Init, network::Network, notation::NetworkSpec, session::Session};
/// let network = Network::<f32>::new(&"conv4-bn-relu-pool-affine3".parse::<NetworkSpec>()?, [1, 8, 8], Init::He, 0)?;
/// let session = Session::new(&network, 2)?;
/// let mut scratch = session.scratch();
/// let mut scores = [0.0; 2 * 3];
/// session.run(&[0.5; 2 * 64], &mut scores, &mut scratch)?;
/// # Ok::<(), gemmnet::Error>(())
/// ```
#[derive(Debug)]
pub struct Session<T: Element> {
    folded: Network<T>,
    /// For each step.
    prepared: Vec<Option<Prepared<T>>>,
    batch: usize,
}

/// Images from which on a piece takes no less scratch the more there are: four groups of 64 are whole groups.
const VARIED: usize = 256;

/// The memory of one caller of a [`Session`].
#[derive(Debug)]
pub struct SessionScratch<T: Element>(Memory<T>);

/// A block as a session runs it. Max pooling before batchnorm keeps it: a negative scale would turn maxima into minima.
fn fold(parts: &BlockParts) -> BlockParts {
    let parts = BlockParts { dropout: None, ..*parts };
    if folds(&parts) { BlockParts { norm: None, bias: true, ..parts } } else { parts }
}

fn folds(parts: &BlockParts) -> bool {
    parts.core.is_some() && parts.norm.is_some() && parts.early_pool.is_none()
}

impl<T: Element> Session<T> {
    /// A session for up to `batch` images at once, with the network's present parameters and running statistics. What is
    /// fastest for a layer may depend on `batch`, so that scores of sessions for other batches differ in rounding.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a batch of 0, or for more images than fit any memory.
    pub fn new(network: &Network<T>, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::invalid("session", "a batch of 0 images", "give at least 1"));
        }
        let image = network.input().iter().product();
        let largest = network.steps().iter().map(Step::output_len).max().unwrap_or(0).max(image);
        check_elements("session", &[batch, largest])?;
        let fold = |(gathered, step): (&Gathered, &Step<T>)| match &step.kernel {
            Kernel::Block { block, .. } => {
                Gathered { fused: Fused::Block(Box::new(fold(block.parts()))), ..gathered.clone() }
            }
            Kernel::Sum(_) | Kernel::Layer { .. } => gathered.clone(),
        };
        let gathered = network.gathered().iter().zip(network.steps()).map(fold).collect();
        let mut folded = Network::zeros(network.spec(), gathered, network.input())?;
        for step in folded.steps_mut() {
            if let Kernel::Block { block, .. } = &mut step.kernel {
                block.set_images(batch);
            }
        }
        block_channels(folded.steps_mut());
        let steps = folded.steps().to_vec();
        for (from, to) in network.steps().iter().zip(&steps) {
            copy_step(network, from, &mut folded, to);
            if let Kernel::Block { block, places: Weights { w: Some(w), .. }, .. } = &to.kernel {
                block.order_inputs(folded.params_mut().slice_mut(*w));
            }
        }
        let prepare = |step: &Step<T>| match &step.kernel {
            Kernel::Block { block, places, .. } => block.prepare(places.values(folded.params()).w),
            Kernel::Sum(_) | Kernel::Layer { .. } => None,
        };
        let prepared = steps.iter().map(prepare).collect();
        Ok(Session { folded, prepared, batch })
    }

    /// Images of the largest batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Memory for one caller, for the threads that it is called on. Everything is allocated here.
    pub fn scratch(&self) -> SessionScratch<T> {
        let steps = self.folded.steps();
        let mut scratch = SessionScratch(Memory::new(steps, for_inference(steps)));
        let image: usize = self.folded.input().iter().product();
        // Images that are few for the threads are cut in other ways, and others may be, too: fewer can take more memory.
        let most = |step: &Step<T>| match &step.kernel {
            Kernel::Block { block, .. } => {
                let taken = |images| Some((block.scratch_len(images)?, images));
                (1..=self.batch.min(VARIED)).filter_map(taken).max().map(|(_, images)| images)
            }
            Kernel::Sum(_) | Kernel::Layer { .. } => None,
        };
        let counts: BTreeSet<usize> = (1..2 * current_threads()).chain(steps.iter().filter_map(most)).collect();
        let x = Buffer::zeroed(self.batch * image);
        for &images in counts.range(..self.batch).chain([&self.batch]) {
            self.forward(images, &x[..images * image], &mut scratch);
        }
        scratch
    }

    fn forward(&self, images: usize, x: &[T], scratch: &mut SessionScratch<T>) {
        let Session { folded, prepared, .. } = self;
        let (params, statistics) = (folded.params(), folded.statistics());
        let run = Run { steps: folded.steps(), params, statistics, prepared, images, x };
        together(|| run.forward(&mut scratch.0, Phase::Test, |_| Pass::Test));
    }

    /// Scores of images `x` `(N, C, H, W)` into `scores` `(N, classes)`, for `N` up to the session's batch. Those of an
    /// image do not depend on the others.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not hold one image per row of scores, [`Error::Invalid`] for too many of them.
    pub fn run(&self, x: &[T], scores: &mut [T], scratch: &mut SessionScratch<T>) -> Result<()> {
        let classes = self.folded.classes();
        let image: usize = self.folded.input().iter().product();
        let images = scores.len() / classes;
        check_shape("session", "scores", &[scores.len()], &[images * classes])?;
        check_shape("session", "x", &[x.len()], &[images * image])?;
        if images > self.batch {
            let problem = format!("{images} images, more than the {} it was made for", self.batch);
            return Err(Error::invalid("session", problem, "pass fewer, or make it for more"));
        }
        self.forward(images, x, scratch);
        scores.copy_from_slice(scratch.0.values.get(self.folded.steps().len(), scores.len()));
        Ok(())
    }

    /// [`Session::run`] of a view, which is copied only if it is not in standard layout.
    ///
    /// # Errors
    /// As [`Session::run`], and [`Error::Shape`] if the images are not of the network's size.
    pub fn run_view(&self, x: ArrayView4<'_, T>, scores: &mut [T], scratch: &mut SessionScratch<T>) -> Result<()> {
        let [c, h, w] = self.folded.input();
        check_shape("session", "x", x.shape(), &[x.shape()[0], c, h, w])?;
        self.run(&row_major(x), scores, scratch)
    }
}

/// Copies a step's parameters and statistics, batchnorm folded into the product where `to` has none.
fn copy_step<T: Element>(network: &Network<T>, from: &Step<T>, folded: &mut Network<T>, to: &Step<T>) {
    for (from, to) in from.params().into_iter().zip(to.params()) {
        if network.params().param(from).name == folded.params().param(to).name {
            folded.params_mut().slice_mut(to).copy_from_slice(network.params().slice(from));
        }
    }
    let (
        Kernel::Block { block, places: from, running: Some((mean, var)) },
        Kernel::Block { places: to, running: to_running, .. },
    ) = (&from.kernel, &to.kernel)
    else {
        return;
    };
    let statistics = (network.statistics().slice(*mean), network.statistics().slice(*var));
    match *to_running {
        Some((mean, var)) => {
            let [to_mean, to_var] = folded.statistics_mut().slices_mut([Some(mean), Some(var)]);
            to_mean.copy_from_slice(statistics.0);
            to_var.copy_from_slice(statistics.1);
        }
        None => {
            let [w, b] = folded.params_mut().slices_mut([to.w, to.b]);
            fold_norm(block, from.values(network.params()), statistics, w, b);
        }
    }
}

/// `w' = s w` and `b' = beta + s (b - m)`
fn fold_norm<T: Element>(block: &Block, from: Weights<&[T]>, (mean, var): (&[T], &[T]), w: &mut [T], b: &mut [T]) {
    let eps = T::of(block.parts().norm.expect("it has running statistics").eps);
    let scale: Vec<T> = from.gamma.iter().zip(var).map(|(&gamma, &var)| gamma / (var + eps).sqrt()).collect();
    w.copy_from_slice(from.w);
    block.scale_outputs(w, &scale);
    for (c, b) in b.iter_mut().enumerate() {
        let bias = from.b.get(c).copied().unwrap_or(T::zero());
        *b = from.beta[c] + scale[c] * (bias - mean[c]);
    }
}
