//! NumPy's files, `.npy` and `.npz`: no panic; images and labels of what is opened are all there.
#![no_main]

use std::fs::File;
use std::io::Write;

use gemmnet::data::files::{Format, arrays};
use gemmnet_fuzz::{check_error, check_opened, empty_folder, files};
use libfuzzer_sys::fuzz_target;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const NAMES: [&str; 8] =
    ["x_train.npy", "y_train.npy", "x_val.npy", "y_val.npy", "x_test.npy", "y_test.npy", "class_names.txt", "data.npz"];

fuzz_target!(|data: &[u8]| {
    // An odd first byte packs all arrays into one file: a checksum is seldom guessed.
    let Some((how, data)) = data.split_first() else { return };
    let dir = empty_folder();
    let files = files(data, &NAMES);
    if how % 2 == 1 {
        let mut packed = ZipWriter::new(File::create(dir.join("packed.npz")).expect("our own folder"));
        for (name, bytes) in &files {
            // The same name again is refused.
            if name.ends_with(".npy") && packed.start_file(*name, SimpleFileOptions::default()).is_ok() {
                packed.write_all(bytes).expect("our own folder");
            }
        }
        packed.finish().expect("our own folder");
    }
    for (name, bytes) in &files {
        if how % 2 == 0 || !name.ends_with(".npy") {
            std::fs::write(dir.join(name), bytes).expect("our own folder");
        }
    }
    if let Err(error) = Format::of(&dir) {
        check_error(&error);
    }
    check_opened(arrays::open(&dir));
});
