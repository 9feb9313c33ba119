//! A folder with a whole picture and one of any bytes: no panic, no memory beyond what a picture may take; what is read has the
//! size that was asked for, and a second look at the folder shows the same.
#![no_main]

use gemmnet::data::files::decode::read_picture;
use gemmnet::data::files::folder::{Options, open, verify};
use gemmnet::data::{Source, Split};
use gemmnet_fuzz::{check_error, check_source, empty_folder};
use libfuzzer_sys::fuzz_target;

/// A black pixel.
const WHOLE: [u8; 58] = [
    b'B', b'M', 58, 0, 0, 0, 0, 0, 0, 0, 54, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 24, 0, 0, 0, 0, 0, 4,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fuzz_target!(|data: &[u8]| {
    let dir = empty_folder();
    let (pictures, cache) = (dir.join("pictures"), dir.join("cache"));
    let class = pictures.join("class");
    std::fs::create_dir_all(&class).expect("our own folder");
    std::fs::write(class.join("a.bmp"), WHOLE).expect("our own folder");
    let path = class.join("b.jpg");
    std::fs::write(&path, data).expect("our own folder");

    let mut whole = false;
    for dim in [[3, 8, 8], [1, 9, 20]] {
        match read_picture(&path, dim) {
            Ok(pixels) => {
                assert_eq!(pixels.len(), dim.iter().product::<usize>());
                whole = true;
            }
            Err(error) => {
                check_error(&error);
                assert!(!whole, "refused in one size only");
            }
        }
    }
    let report = verify(&pictures, &mut |_| {}).expect("a folder that can be read");
    report.problems.iter().for_each(check_error);
    assert_eq!(report.problems.is_empty(), whole);

    let source = open(&pictures, Options::default(), &cache, &mut |_| {}).expect("one picture is whole");
    let again = open(&pictures, Options::default(), &cache, &mut |_| {}).expect("what is kept");
    assert_eq!(source.len(Split::Train) + source.len(Split::Validation), 1 + usize::from(whole));
    for split in Split::ALL {
        assert_eq!(source.len(split), again.len(split));
        (0..source.len(split)).for_each(|index| assert_eq!(source.image(split, index), again.image(split, index)));
    }
    check_source(source);
});
