//! Level 5. Tests of the notation.

use super::names::NAMES;
use super::*;
use crate::nn::layers::Divide;

const RELU: LayerSpec = LayerSpec::Activation(Activation::Relu);
const SAME: Conv2d =
    Conv2d { stride: (1, 1), padding: Padding::Same, dilation: (1, 1), groups: 1, algorithm: Algorithm::Auto };

fn conv(filters: usize) -> LayerSpec {
    LayerSpec::Conv { filters, kernel: (3, 3), conv: SAME, bias: true }
}

fn affine(outputs: usize) -> LayerSpec {
    LayerSpec::Affine { outputs, bias: true }
}

fn only(text: &str) -> LayerSpec {
    let spec = NetworkSpec::parse(text).unwrap();
    assert_eq!(spec.layers.len(), 1, "{text}");
    spec.layers[0].clone()
}

/// Every text reads as the layer, which prints as one of them.
#[track_caller]
fn check_forms(cases: &[(&[&str], LayerSpec)]) {
    for (texts, want) in cases {
        for text in *texts {
            assert_eq!(only(text), *want, "{text}");
        }
        assert!(texts.contains(&want.to_string().as_str()), "{texts:?} prints as {want}");
    }
}

#[test]
fn convolutions_and_their_canonical_forms() {
    let kernel = (3, 3);
    check_forms(&[
        (&["conv32", "CONV32", "conv32k3", "conv32psame", "conv32s1k3d1g1"][..], conv(32)),
        (
            &["conv64k7s2p3", "conv64p3s2k7", "conv64k7x7s2x2p3"],
            LayerSpec::Conv {
                filters: 64,
                kernel: (7, 7),
                conv: Conv2d { stride: (2, 2), padding: Padding::All(3), ..SAME },
                bias: true,
            },
        ),
        (
            &["conv8k3x5s2x1d2x1", "conv8d2x1s2x1k3x5"],
            LayerSpec::Conv {
                filters: 8,
                kernel: (3, 5),
                conv: Conv2d { stride: (2, 1), dilation: (2, 1), ..SAME },
                bias: true,
            },
        ),
        (
            &["conv8p0d2g4", "conv8pvalidd2g4"],
            LayerSpec::Conv {
                filters: 8,
                kernel,
                conv: Conv2d {
                    padding: Padding::Valid,
                    dilation: (2, 2),
                    groups: 4,
                    stride: (1, 1),
                    ..Conv2d::default()
                },
                bias: true,
            },
        ),
        (
            &["conv8p0x1x2x3"],
            LayerSpec::Conv {
                filters: 8,
                kernel,
                conv: Conv2d { padding: Padding::Sides { top: 0, bottom: 1, left: 2, right: 3 }, ..SAME },
                bias: true,
            },
        ),
    ]);
}

#[test]
fn other_layers_and_their_canonical_forms() {
    let pool = Pool2d::square(2);
    let layer = |activation| LayerSpec::Activation(activation);
    check_forms(&[
        (&["pool", "maxpool", "Pool2", "pool2x2s2p0"], LayerSpec::MaxPool(pool)),
        (&["pool3", "maxpool3s3"], LayerSpec::MaxPool(Pool2d::square(3))),
        (&["pool2s1"], LayerSpec::MaxPool(Pool2d { stride: (1, 1), ..pool })),
        (
            &["pool3s2p1", "pool3p1s2"],
            LayerSpec::MaxPool(Pool2d { window: (3, 3), stride: (2, 2), padding: Padding::All(1) }),
        ),
        (&["pool2x1"], LayerSpec::MaxPool(Pool2d { window: (2, 1), stride: (2, 1), ..pool })),
        (&["pool2psame"], LayerSpec::MaxPool(Pool2d { padding: Padding::Same, ..pool })),
        (&["avgpool", "avgpool2"], LayerSpec::AvgPool(pool)),
        (&["avgpool3s1"], LayerSpec::AvgPool(Pool2d { stride: (1, 1), ..Pool2d::square(3) })),
        (&["gap"], LayerSpec::GlobalAvgPool),
        (&["affine256", "fc256", "linear256"], affine(256)),
        (&["bn", "BatchNorm", "bn0.9", "bn0.9g1e0.00001"], LayerSpec::BATCH_NORM),
        (
            &["bn0.6e0.001g0", "batchnorm0.6g0e0.001"],
            LayerSpec::BatchNorm { norm: BatchNorm { eps: 1e-3, momentum: 0.6 }, fixed_scale: true },
        ),
        (&["bn0.9g0"], LayerSpec::BatchNorm { norm: BatchNorm::USUAL, fixed_scale: true }),
        (&["conv8b0", "conv8b0k3"], LayerSpec::Conv { filters: 8, kernel: (3, 3), conv: SAME, bias: false }),
        (&["affine9b0", "fc9b0"], LayerSpec::Affine { outputs: 9, bias: false }),
        (&["affine9", "affine9b1"], affine(9)),
        (&["whiten2", "whiten2s1"], LayerSpec::Whiten { size: 2, stride: (1, 1) }),
        (&["whiten4s2", "whiten4s2x2"], LayerSpec::Whiten { size: 4, stride: (2, 2) }),
        (&["div256"], LayerSpec::Layer(Arc::new(Divide { divisor: 256 }))),
        (&["relu", "ReLU"], RELU),
        (&["silu"], layer(Activation::Silu)),
        (&["gelu"], layer(Activation::Gelu)),
        (&["leaky", "leakyrelu", "leaky0.01"], layer(Activation::LeakyRelu { slope: 0.01 })),
        (&["leaky0.1", "leakyrelu.1"], layer(Activation::LeakyRelu { slope: 0.1 })),
        (&["dropout0.5", "dropout.5", "dropout0.50"], LayerSpec::Dropout { p: 0.5 }),
        (&["dropout0"], LayerSpec::Dropout { p: 0.0 }),
    ]);
}

#[test]
fn every_name_that_may_be_suggested_is_read() {
    for name in NAMES.into_iter().chain(Activation::NAMES.map(|(name, _)| name)) {
        let read = |text: String| NetworkSpec::parse(&text).is_ok();
        assert!(
            read(format!("relu-{name}"))
                || read(format!("{name}1"))
                || read(format!("{name}0.1"))
                || read(format!("{name}[relu]")),
            "{name}"
        );
    }
}

#[test]
fn losses() {
    let softmax = |smoothing| LossSpec::Softmax { smoothing };
    for (text, loss, reduction) in [
        ("affine10", softmax(0.0), Reduction::Mean),
        ("affine10-softmax", softmax(0.0), Reduction::Mean),
        ("affine10-softmax0.1", softmax(0.1), Reduction::Mean),
        ("affine10-SVM", LossSpec::Svm, Reduction::Mean),
        ("affine10 - [svm]", LossSpec::Svm, Reduction::Mean),
        ("affine10-softmaxsum", softmax(0.0), Reduction::Sum),
        ("affine10-softmax0.2Sum", softmax(0.2), Reduction::Sum),
        ("affine10-svmsum", LossSpec::Svm, Reduction::Sum),
    ] {
        let want = NetworkSpec { layers: vec![affine(10)], loss, reduction };
        assert_eq!(NetworkSpec::parse(text).unwrap(), want, "{text}");
    }
    for text in ["affine10-sum", "affine10-softmaxsum0.2", "affine10-softmax0.2sums"] {
        assert!(NetworkSpec::parse(text).is_err(), "{text}");
    }
    assert_eq!(NetworkSpec::parse("affine10").unwrap().to_string(), "affine10-softmax");
    assert_eq!(NetworkSpec::parse("affine10-softmax0.10").unwrap().to_string(), "affine10-softmax0.1");
    assert_eq!(NetworkSpec::parse("affine10-svm").unwrap().to_string(), "affine10-svm");
}

#[test]
fn the_architectures_of_the_assignment() {
    for (text, unrolled) in [
        ("conv32k7-relu-pool-affine100-relu-affine10", "conv32k7-relu-pool-affine100-relu-affine10-softmax"),
        (
            "[conv32-relu-pool]x2 - conv64 - relu - [affine100-relu]x2 - affine10 - softmax",
            "conv32-relu-pool-conv32-relu-pool-conv64-relu-affine100-relu-affine100-relu-affine10-softmax",
        ),
        (
            "[conv32-relu-conv32-relu-pool]x3-[affine256]x1-affine10-svm",
            "conv32-relu-conv32-relu-pool-conv32-relu-conv32-relu-pool-conv32-relu-conv32-relu-pool-affine256-affine10-svm",
        ),
        (
            "[conv32-bn-relu-conv32-bn-relu-pool]x3-[affine256-bn-relu-dropout0.5]-affine10",
            "conv32-bn-relu-conv32-bn-relu-pool-conv32-bn-relu-conv32-bn-relu-pool-conv32-bn-relu-conv32-bn-relu-pool-\
             affine256-bn-relu-dropout0.5-affine10-softmax",
        ),
    ] {
        assert_eq!(NetworkSpec::parse(text).unwrap().to_string(), unrolled);
    }
}

#[test]
fn residuals_nest_repeat_and_print() {
    let inside = |layers: &[LayerSpec]| LayerSpec::Residual(layers.to_vec());
    for (text, want, printed) in [
        ("res[conv8-relu]", vec![inside(&[conv(8), RELU])], "res[conv8-relu]-softmax"),
        (" Res [ conv8 - relu ] x 2 ", vec![inside(&[conv(8), RELU]); 2], "res[conv8-relu]-res[conv8-relu]-softmax"),
        (
            "[res[bn]-relu]x2",
            vec![vec![inside(&[LayerSpec::BATCH_NORM]), RELU]; 2].concat(),
            "res[bn]-relu-res[bn]-relu-softmax",
        ),
        (
            "res[[relu]x2-res[bn]]",
            vec![inside(&[RELU, RELU, inside(&[LayerSpec::BATCH_NORM])])],
            "res[relu-relu-res[bn]]-softmax",
        ),
    ] {
        let spec = NetworkSpec::parse(text).unwrap();
        assert_eq!((&spec.layers, spec.to_string().as_str()), (&want, printed), "{text}");
    }
    let deep = |depth: usize| NetworkSpec::parse(&format!("{}relu{}", "res[".repeat(depth), "]".repeat(depth)));
    assert!(deep(64).is_ok());
    assert!(deep(100_000).unwrap_err().to_string().contains("nest fewer"));
}

#[test]
fn algorithms_are_part_of_the_notation() {
    for (text, algorithm) in [
        ("conv8aim2col", Algorithm::Im2col),
        ("conv8awinograd", Algorithm::Winograd),
        ("conv8adepthwise", Algorithm::Depthwise),
    ] {
        let want = LayerSpec::Conv { filters: 8, kernel: (3, 3), conv: Conv2d { algorithm, ..SAME }, bias: true };
        assert_eq!(only(text), want);
        assert_eq!(want.to_string(), text);
    }
}

#[test]
fn groups_nest_and_spaces_are_free() {
    for text in [
        "[[conv8-relu]x2-bn]x2",
        " [ [ conv8 - relu ] x 2 - bn ] x 2 ",
        "[[conv8-relu]*2-bn]×2",
        "[[\tconv8\n-relu] X2-\nbn]x2\n",
        "[conv8-relu-[conv8-relu]x1-[bn]]x2",
    ] {
        let once = [conv(8), RELU, conv(8), RELU, LayerSpec::BATCH_NORM];
        assert_eq!(NetworkSpec::parse(text).unwrap().layers, [once.clone(), once].concat(), "{text}");
    }
    assert_eq!(NetworkSpec::parse("[relu]x1000").unwrap().layers.len(), 1000);
}

/// A text, the character at fault, and parts of the problem and the fix.
type Fault = (&'static str, usize, &'static str, &'static str);

#[track_caller]
fn check_faults(cases: &[Fault]) {
    for &(text, position, problem, fix) in cases {
        let error = NetworkSpec::parse(text).unwrap_err();
        let Error::Notation { notation, position: at, problem: what, fix: todo } = &error else {
            panic!("`{text}`: {error:?}");
        };
        assert_eq!(*notation, text.replace('\n', " "));
        assert_eq!(*at, position, "`{text}`: {error}");
        assert!(what.contains(problem) && todo.contains(fix), "`{text}`: {error}");
    }
}

#[test]
fn faults_of_layers_name_the_character_the_problem_and_the_fix() {
    check_faults(&[
        ("", 0, "empty", "conv32-relu-pool-affine10"),
        (" \n", 0, "empty", "conv32-relu-pool-affine10"),
        // Names.
        ("con32", 0, "no layer `con`", "did you mean `conv32`?"),
        ("relu-afine100-relu", 5, "no layer `afine`", "did you mean `affine100`?"),
        ("conv32k5-[rellu]", 10, "no layer `rellu`", "did you mean `relu`?"),
        ("Dropuot0.5", 0, "no layer `dropuot`", "did you mean `dropout0.5`?"),
        ("transformer", 0, "no layer `transformer`", "choose from conv, whiten, pool"),
        // Numbers.
        ("conv", 4, "number is missing", "give the number of filters, such as conv32"),
        ("relu - conv-relu", 11, "number is missing", "give the number of filters, such as conv32"),
        ("affine", 6, "number is missing", "give the number of outputs, such as affine100"),
        ("dropout", 7, "number is missing", "probability of dropping"),
        ("conv32k-relu", 7, "number is missing", "height x width"),
        ("conv32k3x", 9, "number is missing", "height x width"),
        ("conv32g", 7, "number is missing", "number of groups"),
        ("conv32p", 7, "number is missing", "psame"),
        ("conv0", 4, "0 is too small", "at least 1"),
        ("affine000", 6, "000 is too small", "at least 1"),
        ("conv32s2x0", 9, "0 is too small", "at least 1"),
        ("pool0", 4, "0 is too small", "at least 1"),
        ("conv1000001", 4, "1000001 is too large", "at most 1000000"),
        ("fc99999999999999999999999", 2, "99999999999999999999999 is too large", "at most 1000000"),
        ("conv32p1x2", 7, "2 numbers", "top x bottom x left x right"),
        ("relu-dropout1", 12, "1 is out of range", "less than 1"),
        ("dropout0.5.5", 7, "`0.5.5` is not a number", "dropout0.5"),
        ("leaky1.5", 5, "1.5 is out of range", "slope of 0 to 1"),
        ("affine10-softmax2", 16, "2 is out of range", "0 to 1"),
        // Options.
        ("conv32z2", 6, "conv has no option `z`", "its options are k, s, p, d, g, a"),
        ("conv32k3k5", 8, "option `k` comes twice", "its options are k"),
        ("pool3k2", 5, "pool has no option `k`", "its options are s, p"),
        ("avgpool3s2g2", 10, "avgpool has no option `g`", "its options are s, p"),
        ("conv32x3", 6, "conv has no option `x`", "only groups are repeated"),
        ("conv32afft", 7, "no such algorithm", "im2col, winograd, depthwise"),
        ("whiten", 6, "number is missing", "such as whiten2"),
        ("bn1.5", 2, "1.5 is out of range", "momentum of 0 to 1"),
        ("bn0.9e0", 6, "0 is out of range", "above 0"),
        ("bn0.9g2", 6, "2 is too large", "at most 1"),
        ("affine9b2", 8, "2 is too large", "at most 1"),
        ("affine9k3", 7, "affine has no option `k`", "its options are b"),
        ("conv1.5", 5, "conv has no option `.`", "its options are k"),
    ]);
    // A number that is none in f64, and what would clear a terminal: see fuzz/fuzz_targets/notation.rs.
    let endless = NetworkSpec::parse(&format!("bn0.9e{}", "9".repeat(400))).unwrap_err().to_string();
    assert!(endless.contains("is out of range; give a number above 0"), "{endless}");
    let clears = NetworkSpec::parse("relu-\u{1b}[2J").unwrap_err().to_string();
    assert!(clears.contains("` ` where a layer should be") && clears.contains("`relu- [2J`"), "{clears:?}");
    let pointer = NetworkSpec::parse("[relu]×2-con32").unwrap_err().notation_pointer().unwrap();
    assert_eq!(pointer, "[relu]×2-con32\n         ^");
}

#[test]
fn faults_between_layers_name_the_character_the_problem_and_the_fix() {
    check_faults(&[
        // Joints.
        ("conv32 relu", 7, "`r` follows a complete layer", "join layers with `-`"),
        ("relu5", 4, "`5` follows a complete layer", "join layers with `-`"),
        ("[relu]bn", 6, "`b` follows a complete layer", "join layers with `-`"),
        ("relu[bn]", 4, "`[` follows a complete layer", "join layers with `-`"),
        ("relu x3", 5, "`x` follows a complete layer", "only groups are repeated"),
        ("relu-", 5, "missing at the end", "name a layer"),
        ("relu--bn", 5, "`-` where a layer should be", "name a layer"),
        ("-relu", 0, "`-` where a layer should be", "name a layer"),
        ("32", 0, "`3` where a layer should be", "name a layer"),
        // Groups; positions count characters, not bytes.
        ("res", 3, "a residual without layers", "res[conv16"),
        ("res-relu", 3, "a residual without layers", "res[conv16"),
        ("res[]", 4, "`]` where a layer should be", "name a layer"),
        ("relu-res[relu", 8, "`[` is never closed", "close the group with `]`"),
        ("res[affine10-svm]", 16, "the residual holds the loss", "put the loss after it"),
        ("[relu", 0, "`[` is never closed", "close the group with `]`"),
        ("[relu]×2-[[bn]-gap", 9, "`[` is never closed", "close the group with `]`"),
        ("relu]", 4, "`]` closes no group", "remove it"),
        ("[]", 1, "`]` where a layer should be", "name a layer"),
        ("[relu]x", 7, "number is missing", "number of repetitions"),
        ("[relu]x0", 7, "0 is too small", "at least 1"),
        ("[relu] x 1001", 9, "1001 is too large", "at most 1000"),
        ("[[relu]x1000]x1000", 12, "more than 10000 layers", "repeat less"),
        // The loss.
        ("affine10-softmax-relu", 17, "follows the loss", "end with the loss"),
        ("affine10-svm-softmax", 13, "follows the loss", "end with the loss"),
        ("[affine10-svm]x2", 13, "holds the loss", "put the loss after it"),
        ("softmax", 0, "no layer comes before the loss", "begin with the layers"),
    ]);
}

#[test]
fn json_holds_the_notation() {
    let spec = NetworkSpec::parse("[conv8-relu]x2-affine10-svm").unwrap();
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(json, r#""conv8-relu-conv8-relu-affine10-svm""#);
    assert_eq!(serde_json::from_str::<NetworkSpec>(&json).unwrap(), spec);
    let error = serde_json::from_str::<NetworkSpec>(r#""conv""#).unwrap_err().to_string();
    assert!(error.contains("number of filters"), "{error}");
}
