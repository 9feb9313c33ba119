//! Level 4. What is trained, cut into the pieces that one thread updates at a time.

use std::ops::Range;

use super::elementwise::CHUNK;
use super::group::Group;
use crate::params::Param;

/// A parameter that is trained.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) range: Range<usize>,
    pub(super) group: usize,
    /// The numbers of its pieces.
    pub(super) pieces: Range<usize>,
    /// Elements of a piece; the last may have fewer.
    pub(super) piece: usize,
    /// Whether the step under way has updated it already.
    pub(super) done: bool,
}

/// The parameters that are trained and their pieces, both in rising order.
#[derive(Clone, Debug, Default)]
pub(super) struct Cut {
    pub(super) spans: Vec<Span>,
    /// Elements of each piece, all of one parameter.
    pub(super) pieces: Vec<Range<usize>>,
}

impl Cut {
    pub(super) fn new(groups: &[Group], params: &[Param], group_of: &[Option<usize>]) -> Self {
        let mut cut = Cut::default();
        let grouped = params.iter().zip(group_of).filter_map(|(param, group)| Some((param, (*group)?)));
        for (Param { range, shape, .. }, group) in grouped.filter(|(_, group)| !groups[*group].frozen) {
            let (first, piece) = (cut.pieces.len(), piece_len(shape));
            let starts = range.clone().step_by(piece);
            cut.pieces.extend(starts.map(|start| start..range.end.min(start + piece)));
            let pieces = first..cut.pieces.len();
            cut.spans.push(Span { range: range.clone(), group, pieces, piece, done: false });
        }
        cut
    }
}

/// Elements of a piece of a parameter of this shape. Those of matrices are of 2^k rows, so that parts of a matrix whose
/// rows are a larger power of two, or a multiple of it, are whole pieces.
fn piece_len(shape: &[usize]) -> usize {
    match *shape {
        [_, cols] if (1..=CHUNK).contains(&cols) => cols << (CHUNK / cols).ilog2(),
        _ => CHUNK,
    }
}
