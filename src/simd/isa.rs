//! Level 1. Which vector instructions are used: the widest that the processor has, or fewer if the user says so.

use std::env::{VarError, var};
use std::fmt;
use std::sync::OnceLock;

use pulp::Arch;

use crate::error::{Error, Result};

/// The variable that limits the instructions, to measure and to test what other processors run.
const MAX_ISA: &str = "GEMMNET_MAX_ISA";

/// Sets of vector instructions, each with all of the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// What every processor of the target has: SSE2 on x86-64, Neon on AArch64.
    Baseline,
    /// AVX2 and FMA: x86-64-v3.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL: x86-64-v4.
    Avx512,
}

impl Isa {
    const NAMES: [(&'static str, Isa); 3] = [("baseline", Isa::Baseline), ("avx2", Isa::Avx2), ("avx512", Isa::Avx512)];

    /// The best that this processor has.
    pub(crate) fn of_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        match Arch::new() {
            Arch::V4(_) => return Isa::Avx512,
            Arch::V3(_) => return Isa::Avx2,
            _ => {}
        }
        Isa::Baseline
    }

    /// The most that `GEMMNET_MAX_ISA` allows: `baseline`, `avx2` or `avx512`; all, if it is not set.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything else.
    pub(crate) fn limit() -> Result<Self> {
        let name = match var(MAX_ISA) {
            Ok(name) => name,
            Err(VarError::NotPresent) => return Ok(Isa::Avx512),
            Err(VarError::NotUnicode(name)) => name.to_string_lossy().into_owned(),
        };
        let known = Isa::NAMES.iter().find(|(known, _)| *known == name.trim());
        known.map(|&(_, isa)| isa).ok_or_else(|| {
            let problem = format!("`{name}` is no set of instructions that gemmnet knows");
            Error::invalid(MAX_ISA, problem, "set it to baseline, avx2 or avx512, or unset it")
        })
    }

    /// The instructions that are used. The answer stays the same while the program runs.
    ///
    /// # Panics
    /// If `GEMMNET_MAX_ISA` is set to something else than [`Isa::limit`] takes.
    pub(crate) fn used() -> Self {
        static USED: OnceLock<Isa> = OnceLock::new();
        *USED.get_or_init(|| Isa::of_processor().min(Isa::limit().unwrap_or_else(|error| panic!("{error}"))))
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Isa::NAMES[*self as usize].0)
    }
}

/// What compiles a loop for [`Isa::used`]: asked for every plane, so found out once.
#[inline]
pub(crate) fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        match (Isa::used(), Arch::new()) {
            (Isa::Baseline, _) => return Arch::Scalar,
            (Isa::Avx2, Arch::V4(simd)) => return Arch::V3(*simd),
            _ => {}
        }
        Arch::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_are_named_as_they_are_ordered() {
        for (i, (name, isa)) in Isa::NAMES.into_iter().enumerate() {
            assert_eq!((isa as usize, isa.to_string().as_str()), (i, name));
        }
        assert!(Isa::NAMES.is_sorted_by_key(|(_, isa)| isa));
    }
}
