//! Level 1. Which functions are compiled for which vectors.

use pulp::Simd;

use super::arch;

/// The value of an expression, compiled for the widest vectors that this processor has and [`super::Isa::limit`] allows.
///
/// All that the expression calls must be inlined into it (`#[inline(always)]`, on closures given to iterators too): what is
/// not stays as it was compiled, for the baseline.
macro_rules! vectorized {
    ($work:expr $(,)?) => {{
        let once = $crate::simd::Once;
        $crate::simd::dispatch(
            #[inline(always)]
            || {
                let _taken = once;
                $work
            },
        )
    }};
}
pub(crate) use vectorized;

/// A closure that takes it can be called once. One that could be called again is called once through a function for the
/// baseline, and if that is large, it stays there with all that was inlined into it.
pub(crate) struct Once;

/// For [`vectorized!`] alone, which sees to it that `work` is inlined where it is compiled again.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    arch().dispatch(work)
}

/// Runs an expression in which `N` is a constant equal to `count`, from 1 to the constant `most`; nothing for 0.
///
/// Each is optimised [`apart`], and none beyond `most` is compiled: inlined into one function first, they would take the compiler
/// several times as long. It may inline what it has optimised.
macro_rules! with_count {
    ($simd:ident, $count:expr, $most:ident, |$N:ident| $work:expr) => {
        $crate::simd::with_count!($simd, $count, $most, |$N| $work, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
    };
    ($simd:ident, $count:expr, $most:ident, |$N:ident| $work:expr, $($n:literal)+) => {{
        const { assert!($most <= 16, "written out up to here") };
        match $count {
            0 => (),
            $($n if const { $n <= $most } => {
                const $N: usize = $n;
                let once = $crate::simd::Once;
                $crate::simd::apart(
                    $simd,
                    #[inline(always)]
                    || {
                        let _taken = once;
                        $work
                    },
                );
            })+
            count => unreachable!("{count} at once, {} at most", $most),
        }
    }};
}
pub(crate) use with_count;

/// For [`with_count!`] alone: runs `work`, all of which is inlined, in a function of its own for the same vectors.
#[inline(always)]
pub(crate) fn apart<S: Simd>(simd: S, work: impl FnOnce()) {
    simd.vectorize(work);
}
