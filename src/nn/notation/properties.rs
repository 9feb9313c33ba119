//! Level 5. Properties of the notation: what is printed reads back, and any text is a network or a fault.

use proptest::prelude::*;

use super::parser::MAX_SIZE;
use super::*;

fn any_pair() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![(1..=9_usize).prop_map(|n| (n, n)), (1..=MAX_SIZE, 1..=MAX_SIZE)]
}

fn any_padding() -> impl Strategy<Value = Padding> {
    let cells = || 0..=MAX_SIZE;
    prop_oneof![
        Just(Padding::Valid),
        Just(Padding::Same),
        (1..=MAX_SIZE).prop_map(Padding::All),
        (cells(), cells(), cells(), cells()).prop_map(|(top, bottom, left, right)| Padding::Sides {
            top,
            bottom,
            left,
            right
        }),
    ]
}

fn any_pool() -> impl Strategy<Value = Pool2d> {
    prop_oneof![
        (1..=4_usize).prop_map(Pool2d::square),
        (any_pair(), any_pair(), any_padding()).prop_map(|(window, stride, padding)| Pool2d {
            window,
            stride,
            padding
        }),
    ]
}

fn any_algorithm() -> impl Strategy<Value = Algorithm> {
    proptest::sample::select(vec![Algorithm::Auto, Algorithm::Im2col, Algorithm::Winograd, Algorithm::Depthwise])
}

fn any_layer() -> impl Strategy<Value = LayerSpec> {
    let residual = |inside| proptest::collection::vec(inside, 1..4).prop_map(LayerSpec::Residual);
    any_plain_layer().prop_recursive(3, 12, 4, residual)
}

fn any_plain_layer() -> impl Strategy<Value = LayerSpec> {
    prop_oneof![
        (
            1..=MAX_SIZE,
            any_pair(),
            any_pair(),
            any_padding(),
            any_pair(),
            (1..=MAX_SIZE, any::<bool>()),
            any_algorithm()
        )
            .prop_map(|(filters, kernel, stride, padding, dilation, (groups, bias), algorithm)| {
                LayerSpec::Conv { filters, kernel, conv: Conv2d { stride, padding, dilation, groups, algorithm }, bias }
            }),
        any_pool().prop_map(LayerSpec::MaxPool),
        any_pool().prop_map(LayerSpec::AvgPool),
        Just(LayerSpec::GlobalAvgPool),
        (1..=MAX_SIZE, any::<bool>()).prop_map(|(outputs, bias)| LayerSpec::Affine { outputs, bias }),
        Just(LayerSpec::BATCH_NORM),
        (1e-12..1.0, 0.0..=1.0, any::<bool>()).prop_map(|(eps, momentum, fixed_scale)| {
            LayerSpec::BatchNorm { norm: BatchNorm { eps, momentum }, fixed_scale }
        }),
        (1..=MAX_SIZE, any_pair()).prop_map(|(size, stride)| LayerSpec::Whiten { size, stride }),
        (0.0..=1.0).prop_map(|slope| LayerSpec::Activation(Activation::LeakyRelu { slope })),
        proptest::sample::select(Activation::NAMES.to_vec()).prop_map(|(_, a)| LayerSpec::Activation(a)),
        (0.0..1.0).prop_map(|p| LayerSpec::Dropout { p }),
    ]
}

fn any_loss() -> impl Strategy<Value = LossSpec> {
    let softmax = |smoothing| LossSpec::Softmax { smoothing };
    prop_oneof![Just(LossSpec::Svm), Just(softmax(0.0)), (0.0..=1.0).prop_map(softmax)]
}

proptest! {
    #[test]
    fn what_is_printed_reads_back_equal(
        layers in proptest::collection::vec(any_layer(), 1..20),
        loss in any_loss(),
        sum in any::<bool>(),
    ) {
        let reduction = if sum { Reduction::Sum } else { Reduction::Mean };
        let spec = NetworkSpec { layers, loss, reduction };
        prop_assert_eq!(NetworkSpec::parse(&spec.to_string()).unwrap(), spec);
    }

    #[test]
    fn any_text_is_a_network_or_a_fault_inside_it(
        text in prop_oneof![".{0,30}", r"(\[|\]|-| |x|×|[0-9.]|conv|pool|relu|softmax|p|same|k|s){0,20}"],
    ) {
        match NetworkSpec::parse(&text) {
            Ok(spec) => prop_assert_eq!(NetworkSpec::parse(&spec.to_string()).unwrap(), spec),
            Err(Error::Notation { position, .. }) => prop_assert!(position <= text.chars().count()),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
