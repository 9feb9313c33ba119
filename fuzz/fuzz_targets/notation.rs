//! Text of networks: no panic; what is read is printed and read again as the same; a network of it is made, or refused by an
//! error, whatever its sizes; and a small one takes a step of training.
#![no_main]

use std::path::Path;

use gemmnet::nn::init::Init;
use gemmnet::nn::network::{Network, StepKey};
use gemmnet::nn::notation::NetworkSpec;
use gemmnet::train::Model;
use gemmnet_fuzz::{SEPARATOR, archive, check_error, is_quick, is_small, taken};
use libfuzzer_sys::fuzz_target;

/// Images of several sizes; the last with a layer's worth of pixels beyond any memory.
const INPUTS: [[usize; 3]; 4] = [[3, 8, 8], [1, 5, 7], [12, 1, 1], [1 << 15, 1 << 15, 1 << 17]];

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let spec = match NetworkSpec::parse(&text) {
        Ok(spec) => spec,
        Err(error) => {
            check_error(&error);
            assert!(error.notation_pointer().is_some_and(|pointer| pointer.lines().count() == 2));
            return;
        }
    };
    let printed = spec.to_string();
    // Repetitions unroll: a text of thousands of layers is compared no more.
    if printed.len() > 1 << 16 {
        return;
    }
    let again = NetworkSpec::parse(&printed).expect("what was printed is read");
    assert_eq!(again.to_string(), printed);
    assert_eq!(again, spec);

    for input in INPUTS {
        // Sizes are worked out before any memory is taken: those of a network in a file that has none of its tensors.
        let json = serde_json::json!({ "format": 3, "dtype": "f32", "network": printed, "input": input });
        let file = archive(&[&[SEPARATOR], json.to_string().as_bytes()].concat());
        if let Err(error) = Model::<f32>::from_bytes(&file, Path::new("network")) {
            check_error(&error);
        }
        if input[0] > 100 || !is_small(&spec) {
            continue;
        }
        match Network::<f32>::new(&spec, input, Init::He, 0) {
            Ok(mut network) if is_quick(&network) => {
                let x: Vec<f32> = (0..2 * input.iter().product::<usize>()).map(|i| (i % 7) as f32 - 3.0).collect();
                network.loss(&x, &[0, network.classes() - 1], StepKey::default()).expect("images and labels that fit");
                let mut scores = vec![0.0; 2 * network.classes()];
                network.scores(&x, &mut scores).expect("images that fit");
                taken(&printed);
            }
            Ok(_) => {}
            Err(error) => check_error(&error),
        }
    }
});
