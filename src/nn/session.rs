//! Level 4. Inference: a trained network with batchnorm folded into its products, for a fixed batch size.

use crate::blocks::{BlockParts, BlockState, Pass, Weights};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use crate::nn::network::{Network, forward, output};
use crate::params::Params;
use crate::workspace::Workspace;

/// A network for inference. It is immutable, so any number of threads may share it; each brings a [`SessionScratch`].
///
/// Batchnorm after a product is folded into it: with running mean `m` and variance `v` and `s = gamma / sqrt(v + eps)`,
/// `w' = s w` and `b' = beta + s (b - m)`. A call allocates nothing.
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
    batch: usize,
}

/// The memory of one caller of a [`Session`].
#[derive(Debug)]
pub struct SessionScratch<T: Element> {
    states: Vec<BlockState<T>>,
    statistics: Params<T>,
    ws: Workspace,
}

impl<T: Element> Session<T> {
    /// A session for up to `batch` images at once, with the network's present parameters and running statistics.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a batch of 0.
    pub fn new(network: &Network<T>, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::invalid("session", "a batch of 0 images", "give at least 1"));
        }
        let fold = |parts: &BlockParts| match parts.core {
            Some(_) => BlockParts { norm: None, bias: true, dropout: None, ..*parts },
            None => BlockParts { dropout: None, ..*parts },
        };
        let blocks = network.stages().iter().map(|stage| (fold(stage.block.parts()), stage.layers.clone())).collect();
        let mut folded = Network::zeros(network.spec(), blocks, network.input())?;
        let places: Vec<_> = folded.stages().iter().map(|stage| (stage.places, stage.running)).collect();
        for (stage, (to, running)) in network.stages().iter().zip(places) {
            let from = stage.places.values(network.params());
            let statistics =
                stage.running.map(|(mean, var)| (network.statistics().slice(mean), network.statistics().slice(var)));
            let Weights { w, b, gamma, beta } = to;
            let [w, b, gamma, beta] = folded.params_mut().slices_mut([w, b, gamma, beta]);
            w.copy_from_slice(from.w);
            if let (Some(norm), Some((mean, var)), true) =
                (stage.block.parts().norm, statistics, stage.block.parts().core.is_some())
            {
                let scale: Vec<T> =
                    from.gamma.iter().zip(var).map(|(&gamma, &var)| gamma / (var + T::of(norm.eps)).sqrt()).collect();
                stage.block.scale_outputs(w, &scale);
                for (c, b) in b.iter_mut().enumerate() {
                    let bias = from.b.get(c).copied().unwrap_or(T::zero());
                    *b = from.beta[c] + scale[c] * (bias - mean[c]);
                }
            } else {
                b[..from.b.len()].copy_from_slice(from.b);
                gamma.copy_from_slice(from.gamma);
                beta.copy_from_slice(from.beta);
                if let (Some((mean, var)), Some((to_mean, to_var))) = (statistics, running) {
                    folded.statistics_mut().slice_mut(to_mean).copy_from_slice(mean);
                    folded.statistics_mut().slice_mut(to_var).copy_from_slice(var);
                }
            }
        }
        Ok(Session { folded, batch })
    }

    /// Images of the largest batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Memory for one caller, for the threads of the current rayon pool. Everything is allocated here.
    pub fn scratch(&self) -> SessionScratch<T> {
        let mut scratch = SessionScratch {
            states: self.folded.stages().iter().map(|_| BlockState::new()).collect(),
            statistics: self.folded.statistics().clone(),
            ws: Workspace::new(),
        };
        let image: usize = self.folded.input().iter().product();
        self.forward(self.batch, &vec![T::zero(); self.batch * image], &mut scratch);
        scratch
    }

    fn forward(&self, images: usize, x: &[T], scratch: &mut SessionScratch<T>) {
        let SessionScratch { states, statistics, ws } = scratch;
        forward(self.folded.stages(), states, self.folded.params(), statistics, images, x, |_| Pass::Test, ws);
    }

    /// Scores of images `x` `(N, C, H, W)` into `scores` `(N, classes)`, for `N` up to the session's batch.
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
        scores.copy_from_slice(output(self.folded.stages(), &scratch.states, images));
        Ok(())
    }
}
