//! CIFAR-10's and CIFAR-100's folders: no panic; records and labels of what is opened are all there, and the list of problems
//! agrees with whether it is opened.
#![no_main]

use gemmnet::data::Cifar10;
use gemmnet::data::cifar10::verify;
use gemmnet::data::files::{Format, cifar100};
use gemmnet_fuzz::{check_error, check_opened, check_source, empty_folder, files};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 10] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
    "batches.meta.txt",
    "train.bin",
    "test.bin",
    "fine_label_names.txt",
];

fuzz_target!(|data: &[u8]| {
    let dir = empty_folder();
    for (name, bytes) in files(data, &NAMES) {
        std::fs::write(dir.join(name), bytes).expect("our own folder");
    }
    if let Err(error) = Format::of(&dir) {
        check_error(&error);
    }
    let report = verify(&dir);
    report.problems.iter().for_each(check_error);
    match Cifar10::open(&dir) {
        Ok(source) => {
            assert!(report.problems.is_empty() && report.batches.len() == 6);
            check_source(source);
        }
        Err(error) => {
            check_error(&error);
            assert!(!report.problems.is_empty());
        }
    }
    check_opened(cifar100::open(&dir));
});
