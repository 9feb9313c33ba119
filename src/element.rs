//! Level 0. The scalar types a network can be made of.

use std::fmt::{Debug, Display, LowerExp};
use std::iter::Sum;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The scalar types by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `f32`
    F32,
    /// `f64`
    F64,
}

/// `f32` (training and inference) or `f64` (which exists so that gradients can be checked). Sealed.
pub trait Element:
    sealed::Sealed
    + num_traits::Float
    + num_traits::NumAssign
    + num_traits::FloatConst
    + bytemuck::Pod
    + ndarray::ScalarOperand
    + ndarray::LinalgScalar
    + Sum
    + Default
    + Debug
    + Display
    + LowerExp
    + Send
    + Sync
    + 'static
{
    /// Which of the two it is, for code that exists once for each.
    const KIND: Kind;

    /// `"f32"` or `"f64"`, as tables and checkpoints name it.
    const NAME: &'static str;

    /// Rounds an `f64` to this type.
    fn of(value: f64) -> Self;

    /// Widens to `f64`.
    fn f64(self) -> f64;
}

impl Element for f32 {
    const KIND: Kind = Kind::F32;
    const NAME: &'static str = "f32";

    #[inline]
    fn of(value: f64) -> Self {
        value as f32
    }

    #[inline]
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    const KIND: Kind = Kind::F64;
    const NAME: &'static str = "f64";

    #[inline]
    fn of(value: f64) -> Self {
        value
    }

    #[inline]
    fn f64(self) -> f64 {
        self
    }
}
