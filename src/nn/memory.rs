//! Level 5. Where the values of a network lie: buffers that values share whose lives do not overlap.

use crate::blocks::{BlockState, Pass};
use crate::element::Element;
use crate::nn::graph::Value;
use crate::nn::steps::Step;
use crate::workspace::{Buffer, Workspace};

/// When a value is first written and last read, in steps, and how many elements it has an image.
#[derive(Clone, Copy, Debug)]
struct Life {
    born: usize,
    dies: usize,
    len: usize,
}

/// Buffers, and which of them holds each value.
#[derive(Debug)]
pub(super) struct Slots<T> {
    /// For each value; `None` if it is never there.
    of_value: Vec<Option<usize>>,
    /// Elements an image that each buffer must hold.
    lens: Vec<usize>,
    buffers: Vec<Buffer<T>>,
}

impl<T: Element> Slots<T> {
    /// Gives every value a buffer that nobody else uses while it lives. Values are looked at in the order of their birth.
    fn new(lives: &[Option<Life>]) -> Self {
        let mut order: Vec<Value> = (0..lives.len()).filter(|&value| lives[value].is_some()).collect();
        order.sort_by_key(|&value| lives[value].map(|life| life.born));
        let (mut of_value, mut lens, mut free_from) =
            (vec![None; lives.len()], Vec::<usize>::new(), Vec::<usize>::new());
        for value in order {
            let Some(life) = lives[value] else { continue };
            // The smallest that is large enough, else the largest, which grows.
            let free = (0..lens.len()).filter(|&slot| free_from[slot] <= life.born);
            let best =
                free.min_by_key(
                    |&slot| if lens[slot] >= life.len { (0, lens[slot]) } else { (1, usize::MAX - lens[slot]) },
                );
            let slot = best.unwrap_or_else(|| {
                lens.push(0);
                free_from.push(0);
                lens.len() - 1
            });
            lens[slot] = lens[slot].max(life.len);
            free_from[slot] = life.dies + 1;
            of_value[value] = Some(slot);
        }
        let buffers = lens.iter().map(|_| Buffer::default()).collect();
        Slots { of_value, lens, buffers }
    }

    /// Makes room for `images` images.
    pub(super) fn reserve(&mut self, images: usize) {
        for (buffer, len) in self.buffers.iter_mut().zip(&self.lens) {
            buffer.reserve(images * len);
        }
    }

    fn slot(&self, value: Value) -> usize {
        self.of_value[value].expect("a value that is asked for lives")
    }

    /// The first `len` elements of a value.
    pub(super) fn get(&self, value: Value, len: usize) -> &[T] {
        &self.buffers[self.slot(value)][..len]
    }

    /// Takes a value's buffer out, to be written while others are read; [`Slots::put`] brings it back.
    pub(super) fn take(&mut self, value: Value) -> Buffer<T> {
        let slot = self.slot(value);
        std::mem::take(&mut self.buffers[slot])
    }

    pub(super) fn put(&mut self, value: Value, buffer: Buffer<T>) {
        let slot = self.slot(value);
        self.buffers[slot] = buffer;
    }
}

/// For each value the last step that reads it; the output is read at the end.
fn last_reads<T>(steps: &[Step<T>]) -> Vec<usize> {
    let mut last = vec![0; steps.len() + 1];
    for (i, step) in steps.iter().enumerate() {
        step.inputs.iter().for_each(|&value| last[value] = i);
    }
    last[steps.len()] = steps.len();
    last
}

/// Buffers of what each step makes, by its life; value 0 is the images, which are the caller's.
fn slots_of<T: Element>(steps: &[Step<T>], life: impl Fn(usize, &Step<T>) -> Option<Life>) -> Slots<T> {
    let lives = steps.iter().enumerate().map(|(i, step)| life(i, step));
    Slots::new(&std::iter::once(None).chain(lives).collect::<Vec<_>>())
}

/// Buffers of values for training: each its own, because backward needs all of them.
pub(super) fn for_training<T: Element>(steps: &[Step<T>]) -> Slots<T> {
    let life = |i: usize, step: &Step<T>| Some(Life { born: i, dies: steps.len(), len: step.lens(Pass::TRAIN)[1] });
    slots_of(steps, life)
}

/// Buffers of values for inference: a value gives its place up when its last reader is done.
pub(super) fn for_inference<T: Element>(steps: &[Step<T>]) -> Slots<T> {
    let last = last_reads(steps);
    let life = |i: usize, step: &Step<T>| Some(Life { born: i, dies: last[i + 1], len: step.lens(Pass::Test)[1] });
    slots_of(steps, life)
}

/// Buffers of gradients: that of a value lives from the backward pass of its last reader to that of its maker. Time runs
/// backwards.
pub(super) fn for_gradients<T: Element>(steps: &[Step<T>], wanted: &[bool]) -> Slots<T> {
    let (last, end) = (last_reads(steps), steps.len());
    let life = |i: usize, step: &Step<T>| {
        wanted[i + 1].then(|| Life { born: end - last[i + 1], dies: end - i, len: step.lens(Pass::TRAIN)[1] })
    };
    slots_of(steps, life)
}

/// What one step remembers from forward to backward.
#[derive(Debug)]
pub(super) struct StepState<T> {
    pub(super) block: BlockState<T>,
    pub(super) cache: Buffer<T>,
}

/// The memory of a forward pass.
#[derive(Debug)]
pub(super) struct Memory<T> {
    pub(super) values: Slots<T>,
    pub(super) states: Vec<StepState<T>>,
    pub(super) ws: Workspace,
}

impl<T: Element> Memory<T> {
    pub(super) fn new(steps: &[Step<T>], values: Slots<T>) -> Self {
        let state = |_| StepState { block: BlockState::new(), cache: Buffer::default() };
        Memory { values, states: steps.iter().map(state).collect(), ws: Workspace::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(born: usize, dies: usize, len: usize) -> Option<Life> {
        Some(Life { born, dies, len })
    }

    #[test]
    fn values_share_buffers_only_when_their_lives_are_apart() {
        // A chain needs two, a skip connection one more while it is open.
        let chain = Slots::<f32>::new(&[None, life(0, 1, 8), life(1, 2, 4), life(2, 3, 8), life(3, 4, 2)]);
        assert_eq!(chain.of_value, [None, Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!(chain.lens, [8, 4]);
        let skip = Slots::<f32>::new(&[None, life(0, 3, 8), life(1, 2, 8), life(2, 3, 8), life(3, 4, 8)]);
        assert_eq!(skip.of_value, [None, Some(0), Some(1), Some(2), Some(1)]);
    }

    /// Whatever the lives, no two values that live at once have the same buffer, and every buffer is large enough.
    #[test]
    fn no_value_is_overwritten_while_it_lives() {
        use rand::RngExt;
        let mut rng = crate::random::stream(0, crate::random::Purpose::Example, 0, 0);
        for _ in 0..200 {
            let lives: Vec<_> = (0..20)
                .map(|born| {
                    rng.random_bool(0.8).then(|| Life {
                        born,
                        dies: born + rng.random_range(0..8),
                        len: rng.random_range(1..9),
                    })
                })
                .collect();
            let slots = Slots::<f32>::new(&lives);
            for (a, one) in lives.iter().enumerate() {
                let Some(one) = one else { continue };
                assert!(slots.lens[slots.slot(a)] >= one.len);
                for (b, other) in lives.iter().enumerate().skip(a + 1) {
                    let Some(other) = other else { continue };
                    assert!(other.born > one.dies || slots.slot(a) != slots.slot(b), "{lives:?}: {a} and {b}");
                }
            }
        }
    }
}
