//! Files of checkpoints: no panic, and no more memory than the file is long, a few times over; what is read is written and read
//! again as the same, and training goes on from it, or refuses to.
#![no_main]

use std::ops::ControlFlow;
use std::path::Path;

use gemmnet::data::{Dataset, Normalization};
use gemmnet::optim::{Group, UpdateRule};
use gemmnet::train::{Checkpoint, Solver};
use gemmnet_fuzz::{archive, check_error, empty_folder, is_quick, taken};
use libfuzzer_sys::fuzz_target;
use ndarray::Array4;

/// Images to train on: as many as the file says, if that is few.
fn data([c, h, w]: [usize; 3], images: usize) -> gemmnet::Result<Dataset> {
    let x = |n| Array4::from_shape_fn((n, c, h, w), |(n, c, h, w)| (n * 31 + c * 7 + h * 3 + w) as u8);
    let (train, other) = (x(images), x(1));
    let y = vec![0_u8; images];
    Dataset::from_arrays((train.view(), &y), (other.view(), &[0]), (other.view(), &[0]), Normalization::PerChannel)
}

fn go_on(path: &Path, images: usize) -> gemmnet::Result<()> {
    let mut checkpoint = Checkpoint::<f32>::load(path)?;
    checkpoint.options.verbose = false;
    // More of Muon's iterations are no error, and take as long as they say.
    let slow = |group: &Group| matches!(group.rule, UpdateRule::Muon { iterations: 11.., .. });
    if !is_quick(&checkpoint.trained.network) || checkpoint.options.groups.iter().any(slow) {
        return Ok(());
    }
    let data = data(checkpoint.trained.network.input(), images)?;
    let mut solver = Solver::resume(checkpoint, data)?;
    let mut steps = 0;
    solver.train(|_| {
        steps += 1;
        if steps < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    taken("a training that goes on");
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let dir = empty_folder();
    let path = dir.join("checkpoint.safetensors");
    std::fs::write(&path, archive(data)).expect("our own folder");
    if let Err(error) = Checkpoint::<f64>::load(&path) {
        check_error(&error);
    }
    match Checkpoint::<f32>::load(&path) {
        Ok(checkpoint) => {
            let [first, second] = ["first.safetensors", "second.safetensors"].map(|name| dir.join(name));
            checkpoint.save(&first).expect("our own folder");
            let again = Checkpoint::<f32>::load(&first).expect("what was written is read");
            again.save(&second).expect("our own folder");
            let [first, second] = [first, second].map(|path| std::fs::read(path).expect("our own file"));
            assert!(first == second, "written otherwise the second time");
            for images in [1, 8] {
                if let Err(error) = go_on(&path, images) {
                    check_error(&error);
                }
            }
        }
        Err(error) => check_error(&error),
    }
});
