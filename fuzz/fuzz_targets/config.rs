//! config.toml, whole or some keys of it, with every preset: no panic; what a run would write down of it is read again, and says
//! the same to every preset.
#![no_main]

use gemmnet::cli::configs_again;
use gemmnet_fuzz::{check_error, empty_folder, taken};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = empty_folder().join("config.toml");
    std::fs::write(&path, data).expect("our own folder");
    let configs = match configs_again(&path) {
        Ok(configs) => configs,
        Err(error) => return check_error(&error),
    };
    // One of them each time: all would be nine times nine.
    let which = data.len() % configs.len();
    match configs.into_iter().nth(which).expect("there is one") {
        Ok(text) => {
            taken(text.replace('\n', "; "));
            std::fs::write(&path, &text).expect("our own folder");
            for again in configs_again(&path).expect("what a run writes is read") {
                assert_eq!(again.expect("what a run writes is a recipe"), text);
            }
        }
        Err(error) => check_error(&error),
    }
});
