//! IDX files, plain and by gzip: no panic; images and labels of what is opened are all there.
#![no_main]

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use gemmnet::data::files::{Format, idx};
use gemmnet_fuzz::{check_error, check_opened, empty_folder, files};
use libfuzzer_sys::fuzz_target;

/// The last two are compressed here: a checksum is seldom guessed.
const NAMES: [&str; 10] = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "own-train-images.idx3-ubyte",
    "class_names.txt",
    "pack/train-images-idx3-ubyte.gz",
    "pack/train-labels-idx1-ubyte.gz",
];

fuzz_target!(|data: &[u8]| {
    let dir = empty_folder();
    for (name, bytes) in files(data, &NAMES) {
        match name.strip_prefix("pack/") {
            Some(name) => {
                let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
                packed.write_all(&bytes).expect("a vector grows");
                std::fs::write(dir.join(name), packed.finish().expect("a vector grows"))
            }
            None => std::fs::write(dir.join(name), bytes),
        }
        .expect("our own folder");
    }
    if let Err(error) = Format::of(&dir) {
        check_error(&error);
    }
    check_opened(idx::open(&dir));
});
