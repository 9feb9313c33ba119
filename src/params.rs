//! Level 3. Named parameters in one flat vector.
//!
//! One vector, so that the optimizer is one pass, keeping parameters is one copy, and gradients and optimizer state
//! are vectors of the same layout.

use std::ops::Range;

use ndarray::{ArrayViewD, ArrayViewMutD, IxDyn};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::workspace::Buffer;

/// What a parameter is; decides which of them L2 regularisation and weight decay shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// Filters of a convolution or the matrix of an affine layer: regularised.
    Weight,
    /// Added per channel or output: not regularised.
    Bias,
    /// Batchnorm's gamma: not regularised.
    Scale,
    /// Batchnorm's running mean or variance: not trained at all.
    Statistic,
}

/// Place and shape of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Unique name, such as `conv1.weight`.
    pub name: String,
    /// Shape: `(F, C / groups, KH, KW)` for filters, `(D, M)` for affine weights, `(C)` for the rest.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParamKind,
    /// Whether it stays as it is, whatever the optimizer's groups say: a scale of 1, filters that were measured.
    pub fixed: bool,
    /// Its elements in the flat vector, row-major.
    pub range: Range<usize>,
}

/// Names, shapes and places of parameters, without their values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    params: Vec<Param>,
    /// Elements of the flat vector.
    elements: usize,
}

impl Layout {
    /// Each parameter starts on a cache line; the gaps hold zeros for ever.
    const ALIGNMENT: usize = 16;

    /// Adds a parameter and returns its index.
    pub fn push(&mut self, name: String, shape: &[usize], kind: ParamKind) -> usize {
        self.push_param(name, shape, kind, false)
    }

    /// Adds a parameter, `fixed` or trained, and returns its index.
    pub(crate) fn push_param(&mut self, name: String, shape: &[usize], kind: ParamKind, fixed: bool) -> usize {
        let start = self.elements.next_multiple_of(Self::ALIGNMENT);
        let range = start..start + shape.iter().product::<usize>();
        self.elements = range.end;
        self.params.push(Param { name, shape: shape.to_vec(), kind, fixed, range });
        self.params.len() - 1
    }

    /// The parameters, in the order in which they were added.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Param> {
        self.params.iter()
    }

    /// Number of parameters: the index of the next one.
    pub(crate) fn len(&self) -> usize {
        self.params.len()
    }
}

/// Parameters, gradients of parameters, or running statistics: a layout and its values.
#[derive(Clone, Debug)]
pub struct Params<T: Element> {
    layout: Layout,
    values: Buffer<T>,
}

impl<T: Element> Params<T> {
    /// All zeros.
    pub fn zeros(layout: Layout) -> Self {
        let values = Buffer::zeroed(layout.elements);
        Params { layout, values }
    }

    /// All zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the system has no memory for them.
    pub(crate) fn try_zeros(layout: Layout) -> Result<Self> {
        let values = Buffer::try_zeroed(layout.elements).map_err(|e| {
            let megabytes = layout.elements.saturating_mul(size_of::<T>()) >> 20;
            let problem = format!("the system refused {megabytes} MiB of memory for its parameters ({e})");
            Error::invalid("network", problem, "give it fewer or smaller layers")
        })?;
        Ok(Params { layout, values })
    }

    /// Zeros of the same layout: gradients, or optimizer state.
    pub fn zeros_like(&self) -> Self {
        Self::zeros(self.layout.clone())
    }

    /// The parameters in the order of the layers.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Param> {
        self.layout.iter()
    }

    /// Number of values, without the gaps between parameters.
    pub fn count(&self) -> usize {
        self.iter().map(|p| p.range.len()).sum()
    }

    /// Parameter `index`, as [`Layout::push`] numbered it.
    pub fn param(&self, index: usize) -> &Param {
        &self.layout.params[index]
    }

    /// Values of parameter `index`, row-major.
    pub fn slice(&self, index: usize) -> &[T] {
        &self.values[self.layout.params[index].range.clone()]
    }

    /// Values of parameter `index`, row-major, to write to.
    pub fn slice_mut(&mut self, index: usize) -> &mut [T] {
        &mut self.values[self.layout.params[index].range.clone()]
    }

    /// Values of several different parameters at once, to write to; an empty slice for `None`.
    ///
    /// # Panics
    /// If an index occurs twice.
    pub fn slices_mut<const N: usize>(&mut self, indices: [Option<usize>; N]) -> [&mut [T]; N] {
        let ranges = indices.map(|index| index.map_or(0..0, |index| self.layout.params[index].range.clone()));
        self.values.get_disjoint_mut(ranges).expect("parameters do not overlap")
    }

    /// The parameter of this name as an array.
    pub fn get(&self, name: &str) -> Option<ArrayViewD<'_, T>> {
        let param = self.iter().find(|p| p.name == name)?;
        Some(
            ArrayViewD::from_shape(IxDyn(&param.shape), &self.values[param.range.clone()])
                .expect("a layout's range has its shape's length"),
        )
    }

    /// The parameter of this name as an array to write to.
    pub fn get_mut(&mut self, name: &str) -> Option<ArrayViewMutD<'_, T>> {
        let param = self.layout.params.iter().find(|p| p.name == name)?;
        Some(
            ArrayViewMutD::from_shape(IxDyn(&param.shape), &mut self.values[param.range.clone()])
                .expect("a layout's range has its shape's length"),
        )
    }

    /// All values in one vector, gaps included.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// All values in one vector, gaps included, to write to.
    pub fn values_mut(&mut self) -> &mut [T] {
        &mut self.values
    }

    /// Where in the flat vector the trained weights are: what L2 regularisation applies to. In rising order.
    pub fn weight_ranges(&self) -> Vec<Range<usize>> {
        self.iter().filter(|p| p.kind == ParamKind::Weight && !p.fixed).map(|p| p.range.clone()).collect()
    }

    /// Copies the values of `other`.
    ///
    /// # Panics
    /// If the layouts differ.
    pub fn copy_from(&mut self, other: &Self) {
        assert_eq!(self.layout, other.layout, "parameters of another network");
        self.values.copy_from_slice(&other.values);
    }
}
