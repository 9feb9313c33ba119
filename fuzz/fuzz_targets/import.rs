//! A `state_dict` in the safetensors format, and a map of names: no panic; a network that is refused is as it was, one that is
//! taken has every layer from one of the file.
#![no_main]

use std::collections::BTreeSet;
use std::path::Path;

use gemmnet::nn::import::{NameMap, load_state_dict};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet_fuzz::{SEPARATOR, archive, check_error, taken};
use libfuzzer_sys::fuzz_target;

const NETWORKS: [&str; 5] = [
    "affine2",
    "conv2-bn-relu-pool-affine2",
    "conv2b0-conv2b0-gap-affine2b0-affine2",
    "conv2-bn-relu-res[conv2-bn-relu-conv2-bn]-relu-res[conv3s2-bn-relu-conv3-bn]-relu-gap-affine2",
    "conv2-se2-gap-affine2",
];

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else { return };
    let spec = NETWORKS[usize::from(*which) % NETWORKS.len()].parse().expect("a network");
    let mut network = Network::<f32>::new(&spec, [1, 4, 4], Init::He, 0).expect("a network");
    // After the last separator, if there are four: the map, as JSON.
    let (data, map) = match data.iter().enumerate().filter(|(_, byte)| **byte == SEPARATOR).nth(3) {
        Some((at, _)) if data[0] == SEPARATOR => (&data[..at], &data[at + 1..]),
        _ => (data, &b"{}"[..]),
    };
    let names: NameMap = serde_json::from_slice(map).unwrap_or_default();
    let before = network.params().values().to_vec();
    match load_state_dict(&mut network, Path::new("weights"), &archive(data), &names) {
        Ok(pairs) => {
            let here: BTreeSet<_> = pairs.iter().map(|pair| &pair.here).collect();
            assert_eq!(here.len(), pairs.len(), "a layer twice");
            taken(network.spec());
            for pair in &pairs {
                assert!(names.get(&pair.here).is_none_or(|there| *there == pair.there), "not as the map says");
            }
        }
        Err(error) => {
            check_error(&error);
            assert!(before == network.params().values(), "refused, and changed");
        }
    }
});
