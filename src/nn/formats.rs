//! Level 5. Which values of a session, and which in training, lie in blocks of channels.
//!
//! Where a convolution reads what another one made, pixels that are vectors of channels are what both of them work with: planes
//! would be put together and taken apart again. Everything else follows from there.

use crate::blocks::Block;
use crate::element::Element;
use crate::nn::graph::Value;
use crate::nn::steps::{Kernel, Step};
use crate::ops::layout::{Formats, MemoryFormat};

/// Has the blocks of all steps read and write channels in blocks, wherever all who have to do with a value can.
pub(super) fn block_channels<T: Element>(steps: &mut [Step<T>]) {
    let blocked = blocked_values(steps);
    set_formats(steps, &blocked, Block::set_formats);
}

/// The same in training, of values that blocks make and take which train so: everything else works on planes.
pub(super) fn train_in_blocks<T>(steps: &mut [Step<T>]) {
    let may_be = |step: &Step<T>| match &step.kernel {
        Kernel::Block { block, .. } => block.trains_in_blocks(),
        Kernel::Sum(_) | Kernel::Layer { .. } => false,
    };
    let mut blocked = vec![false];
    blocked.extend(steps.iter().map(may_be));
    for step in &*steps {
        step.inputs.iter().for_each(|&value| blocked[value] &= may_be(step));
    }
    // the scores are the caller's
    *blocked.last_mut().expect("the images") = false;
    set_formats(steps, &blocked, Block::set_training_formats);
}

/// Sets the formats of all blocks by which values lie in blocks.
fn set_formats<T>(steps: &mut [Step<T>], blocked: &[bool], set: impl Fn(&mut Block, Formats)) {
    let format = |value: Value| if blocked[value] { MemoryFormat::Blocked } else { MemoryFormat::Planar };
    for (i, step) in steps.iter_mut().enumerate() {
        if let Kernel::Block { block, .. } = &mut step.kernel {
            set(block, Formats { input: format(step.inputs[0]), output: format(i + 1) });
        }
    }
}

/// For each value, whether it lies in blocks: as many as can, but neither the images nor features without planes, which lie in
/// one way only.
fn blocked_values<T: Element>(steps: &[Step<T>]) -> Vec<bool> {
    let has_planes = |step: &Step<T>| step.output[1] * step.output[2] > 1;
    let mut blocked: Vec<bool> = std::iter::once(false).chain(steps.iter().map(has_planes)).collect();
    loop {
        let before = blocked.clone();
        for (i, step) in steps.iter().enumerate() {
            let ([takes, makes], together) = match &step.kernel {
                Kernel::Block { block, .. } => block.may_be_blocked::<T>(),
                Kernel::Sum(_) => ([true; 2], true),
                Kernel::Layer { .. } => ([false; 2], false),
            };
            let read_all = takes && step.inputs.iter().all(|&value| blocked[value]);
            let all = read_all && (blocked[i + 1] || !has_planes(step));
            let (takes, makes) = if together { (all, all) } else { (takes, makes) };
            blocked[i + 1] &= makes;
            step.inputs.iter().for_each(|&value| blocked[value] &= takes);
        }
        if blocked == before {
            return blocked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::init::Init;
    use crate::nn::network::{Network, StepKey};

    /// For each step, whether its value lies in blocks.
    fn blocked<T: Element>(notation: &str) -> Vec<bool> {
        let network = Network::<T>::new(&notation.parse().unwrap(), [16, 8, 8], Init::He, 0).unwrap();
        blocked_values(network.steps())[1..].to_vec()
    }

    /// For each step, whether its value lies in blocks in training.
    fn trained_in_blocks<T: Element>(notation: &str) -> Vec<bool> {
        let network = Network::<T>::new(&notation.parse().unwrap(), [16, 8, 8], Init::He, 0).unwrap();
        let output = |step: &Step<T>| match &step.kernel {
            Kernel::Block { block, .. } => block.training_formats().output == MemoryFormat::Blocked,
            Kernel::Sum(_) | Kernel::Layer { .. } => false,
        };
        network.steps().iter().map(output).collect()
    }

    #[test]
    fn in_training_values_lie_in_blocks_where_none_but_blocks_that_train_so_read_them() {
        let (yes, no) = (true, false);
        for (notation, want) in [
            ("[conv16-bn-relu]x3-affine4", vec![yes, yes, no, no]),
            ("conv16-bn-relu-conv32-bn-pool-conv16-bn-gap", vec![yes, yes, no]),
            ("conv16-bn-relu-conv24-bn-relu-conv16-bn-affine4", vec![yes, yes, no, no]),
            ("conv16-bn-relu-conv20-bn-relu-conv16-bn-affine4", vec![no, no, no, no]), // too many lanes are left over
            ("conv16-bn-relu-dropout0.5-conv16-bn-affine4", vec![no, no, no]),
            ("conv16-bn-relu-conv16k5-bn-relu-conv16-bn-gap", vec![no, no, no]),
            ("conv16-relu-conv16-bn-relu-conv16-bn-gap", vec![no, yes, no]),
            ("conv16-bn-relu-res[conv16-bn-relu-conv16-bn]-relu-gap", vec![no, yes, no, no, no]),
            ("conv16-bn-se4-conv16-bn-affine4", vec![no, no, no, no]),
        ] {
            assert_eq!(trained_in_blocks::<f32>(notation), want, "{notation}");
            assert!(!trained_in_blocks::<f64>(notation).contains(&true), "{notation}");
        }
    }

    /// Gradients of a network whose values lie in blocks, and in planes: `f64` never lies so.
    #[test]
    fn networks_that_train_in_blocks_have_the_gradients_of_planes() {
        let notation =
            "[conv16-bn-gelu]x2-conv24-pool-bn-relu-conv42-bn-relu-pool-res[conv42-bn-relu-conv42-bn]-gelu-affine4";
        fn gradients<T: Element>(notation: &str) -> (f64, Vec<f64>) {
            let mut network = Network::<T>::new(&notation.parse().unwrap(), [3, 12, 12], Init::He, 0).unwrap();
            let x: Vec<T> = (0..21 * 3 * 144).map(|i| T::of(f64::from(f32::sin(i as f32 * 0.37)))).collect();
            let labels: Vec<usize> = (0..21).map(|i| i % 4).collect();
            let loss = network.loss(&x, &labels, StepKey::default()).unwrap();
            (loss.f64(), network.grads().values().iter().map(|v| v.f64()).collect())
        }
        assert_eq!(trained_in_blocks::<f32>(notation).iter().filter(|&&blocked| blocked).count(), 4);
        let ((loss, got), (want_loss, want)) = (gradients::<f32>(notation), gradients::<f64>(notation));
        assert!((loss - want_loss).abs() <= 1e-5, "{loss}, not {want_loss}");
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let off = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want)) / norm(&mut want.iter().copied());
        assert!(off <= 1e-4, "off by {off:e}");
    }

    #[test]
    fn values_lie_in_blocks_where_all_who_read_them_can_take_it() {
        let (yes, no) = (true, false);
        for (notation, want) in [
            ("conv16-relu-conv32k5s2-pool-affine4", vec![yes, yes, no]),
            ("conv16-relu-conv20-relu-conv16-affine4", vec![yes, no, yes, no]),
            ("conv16-relu-conv16g4-gap", vec![no, no]), // the mean has no planes
            ("conv16-relu-se4-conv16-affine4", vec![no, no, yes, no]),
            ("conv16-res[conv32-relu-conv16]-relu-gap-affine4", vec![yes, yes, yes, yes, no, no]),
            ("conv16-res[conv32-relu-conv16-conv16g4]-relu-conv16-gap", vec![no, yes, no, no, no, no]),
            ("conv16-res[conv16]-pool-pool-affine4", vec![yes, yes, yes, yes, yes, no]),
        ] {
            assert_eq!(blocked::<f32>(notation), want, "{notation}");
            assert!(!blocked::<f64>(notation).contains(&true), "{notation}");
        }
    }
}
