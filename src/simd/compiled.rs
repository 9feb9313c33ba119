//! Level 1. Which functions are compiled for which vectors.

use pulp::{NullaryFnOnce, Simd};

use super::arch;

/// The value of an expression, compiled for the widest vectors that this processor has and [`super::Isa::limit`] allows.
///
/// All that the expression calls must be inlined into it (`#[inline(always)]`, on closures given to iterators too): what is
/// not stays as it was compiled, for the baseline.
macro_rules! vectorized {
    ($work:expr $(,)?) => {
        $crate::simd::dispatch(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorized;

/// For [`vectorized!`] alone, which sees to it that `work` is inlined where it is compiled again.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    arch().dispatch(work)
}

/// Runs `work`, all of it inlined, in a function of its own for the same vectors.
#[inline(always)]
pub(crate) fn apart<S: Simd>(simd: S, work: impl FnMut()) {
    /// A closure that can be called again: to call one once goes through a function for the baseline, which may stay one.
    struct Work<F>(F);
    impl<F: FnMut()> NullaryFnOnce for Work<F> {
        type Output = ();

        #[inline(always)]
        fn call(mut self) {
            (self.0)();
        }
    }
    simd.vectorize(Work(work));
}

/// Runs an expression in which `N` is a constant equal to `count`: from 1 to `most`, which is 16 or less; nothing for 0.
///
/// Every one of them is optimised [`apart`], and none beyond `most` is compiled. Together they would take the compiler several times
/// as long; it joins them in the end.
macro_rules! with_count {
    ($simd:ident, $count:expr, $most:ident, |$N:ident| $work:expr) => {
        $crate::simd::with_count!($simd, $count, $most, |$N| $work, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
    };
    ($simd:ident, $count:expr, $most:ident, |$N:ident| $work:expr, $($n:literal)+) => {
        match $count {
            0 => (),
            $($n if const { $n <= $most } => {
                const $N: usize = $n;
                $crate::simd::apart(
                    $simd,
                    #[inline(always)]
                    || $work,
                );
            })+
            count => unreachable!("{count} at once, {} at most", $most),
        }
    };
}
pub(crate) use with_count;
