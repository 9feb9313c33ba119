//! Files with a network, from bytes: no panic, and no more memory than the file is long, a few times over; what is read is
//! written and read again as the same, and a small one runs.
#![no_main]

use std::path::Path;

use gemmnet::nn::session::Session;
use gemmnet::train::Model;
use gemmnet_fuzz::{archive, check_error, empty_folder, is_quick, taken};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = archive(data);
    let name = Path::new("model");
    if let Err(error) = Model::<f64>::from_bytes(&file, name) {
        check_error(&error);
    }
    let mut model = match Model::<f32>::from_bytes(&file, name) {
        Ok(model) => model,
        Err(error) => return check_error(&error),
    };
    let dir = empty_folder();
    let [first, second] = ["first.safetensors", "second.safetensors"].map(|name| dir.join(name));
    model.save(&first).expect("our own folder");
    let again = Model::<f32>::load(&first).expect("what was written is read");
    again.save(&second).expect("our own folder");
    let read = |path: &Path| std::fs::read(path).expect("our own file");
    assert!(read(&first) == read(&second), "written otherwise the second time");
    if let Err(error) = model.save_onnx(&second, true) {
        check_error(&error);
    }
    if !is_quick(&model.network) {
        return;
    }
    let x = vec![1.0; model.network.input().iter().product()];
    let mut scores = vec![0.0; model.network.classes()];
    model.network.scores(&x, &mut scores).expect("an image that fits");
    let session = Session::new(&model.network, 1).expect("a batch of one");
    session.run(&x, &mut scores, &mut session.scratch()).expect("an image that fits");
    taken(model.network.spec());
});
