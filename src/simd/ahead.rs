//! Level 1. What a loop needs next, fetched while it computes something else.

use super::fetch;

/// What each of some loops fetches of what they need next, and at every step: worked out once for all of them, because a division
/// takes as long as a few steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    /// Bytes from what a loop fetches to what the next one does, and from a step to the next.
    part: usize,
    step: usize,
    /// Cache lines of a step.
    lines: usize,
}

impl Share {
    const LINE: usize = 64;
    /// Cache lines that a step mostly has, and no more.
    const LINES: usize = 2;

    /// Elements that lie side by side, `count` of them, for `parts` loops of `steps` steps.
    #[inline(always)]
    pub(crate) fn new<T>(count: usize, parts: usize, steps: usize) -> Self {
        let part = count * size_of::<T>() / parts;
        let step = part.div_ceil(steps.max(1));
        Share { part, step, lines: step.div_ceil(Self::LINE) }
    }

    /// The first few cache lines of `count` rows, `ld` elements apart: those of one row at every step, from the rows that are the
    /// loop's share on. A loop of fewer steps leaves the rest of its share, and one of more goes on to the next loop's rows, or
    /// beyond the last: to count them takes longer than to ask for a line twice.
    #[inline(always)]
    pub(crate) fn rows<T>(count: usize, ld: usize, parts: usize) -> Self {
        let step = ld * size_of::<T>();
        // two lines, and where these do not begin with a line the rest of them
        Share { part: (count / parts).max(1) * step, step, lines: Self::LINES + 1 }
    }
}

/// What a loop needs next, fetched into the caches while it computes something else: some at every step. The processor does so
/// by itself where memory is read without a pause; a product reads its operands in bursts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead<const N: usize> {
    from: [*const u8; N],
    share: Share,
}

impl<const N: usize> Ahead<N> {
    /// The share that belongs to loop `part` of what lies from each of `from` on, which need not be there.
    #[inline(always)]
    pub(crate) fn new<T>(from: [*const T; N], share: Share, part: usize) -> Self {
        let mut ahead = Ahead { from: [std::ptr::null(); N], share };
        for i in 0..N {
            ahead.from[i] = from[i].cast::<u8>().wrapping_add(part * share.part);
        }
        ahead
    }

    #[inline(always)]
    pub(crate) fn fetch(&mut self) {
        for from in &mut self.from {
            (0..Share::LINES).for_each(|line| fetch(from.wrapping_add(line * Share::LINE)));
            // To count them takes time: only where there are more.
            if self.share.lines > Share::LINES {
                (Share::LINES..self.share.lines).for_each(|line| fetch(from.wrapping_add(line * Share::LINE)));
            }
            *from = from.wrapping_add(self.share.step);
        }
    }
}
