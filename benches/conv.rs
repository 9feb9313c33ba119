//! Convolution: naive against fast on CS231n's shape, and fast on the shapes of networks. Work is in FLOP.

use criterion::Criterion;
use gemmnet::ops::conv::Conv2dGrads;
use gemmnet::ops::conv::{ConvGradsMut, ConvInput, ConvPlan, Filters, conv2d_backward_into, conv2d_forward_into};
use gemmnet::shape::Conv2dShape;
use gemmnet::workspace::Workspace;
use gemmnet::{Element, naive};
use ndarray::{Array1, Array4};

use crate::common::{ConvCase, assert_same, group, network_convs, normal, seed_conv, slice, slice_mut, slow};

struct Inputs<T> {
    x: Array4<T>,
    w: Array4<T>,
    b: Array1<T>,
    dout: Array4<T>,
}

impl<T: Element> Inputs<T> {
    fn new(shape: &Conv2dShape) -> Self {
        let [x, w, dout] = [(shape.x(), 0), (shape.w(), 1), (shape.out(), 3)].map(|(dim, index)| normal(dim, index));
        Inputs { x, w, b: normal(shape.filters(), 2), dout }
    }

    fn forward(&self, shape: &Conv2dShape, out: &mut Array4<T>, ws: &mut Workspace) {
        let (plan, w) = (ConvPlan::new::<T>(shape).expect("Auto is for all"), Filters::Plain(slice(&self.w)));
        conv2d_forward_into(&plan, shape.images(), slice(&self.x), w, Some(slice(&self.b)), slice_mut(out), ws);
    }

    fn backward(&self, shape: &Conv2dShape, grads: &mut Conv2dGrads<T>, ws: &mut Workspace) {
        let Conv2dGrads { dx, dw, db } = grads;
        let plan = ConvPlan::new::<T>(shape).expect("Auto is for all");
        let input = ConvInput { images: shape.images(), x: slice(&self.x), w: slice(&self.w) };
        let grads = ConvGradsMut { dx: Some(slice_mut(dx)), dw: Some(slice_mut(dw)), db: Some(slice_mut(db)) };
        conv2d_backward_into(&plan, slice(&self.dout), input, grads, ws);
    }

    fn naive_forward(&self, case: &ConvCase) -> Array4<T> {
        naive::conv2d_forward(self.x.view(), self.w.view(), Some(self.b.view()), &case.conv).expect("the shapes fit")
    }

    fn naive_backward(&self, case: &ConvCase) -> Conv2dGrads<T> {
        naive::conv2d_backward(self.dout.view(), self.x.view(), self.w.view(), &case.conv).expect("the shapes fit")
    }
}

fn outputs<T: Element>(shape: &Conv2dShape) -> (Array4<T>, Conv2dGrads<T>) {
    let grads =
        Conv2dGrads { dx: Array4::zeros(shape.x()), dw: Array4::zeros(shape.w()), db: Array1::zeros(shape.filters()) };
    (Array4::zeros(shape.out()), grads)
}

/// Stops unless the fast layer does on `images` images what its naive twin does.
fn check<T: Element>(case: &ConvCase, images: usize, ws: &mut Workspace) {
    let shape = case.shape.with_images(images);
    let inputs = Inputs::<T>::new(&shape);
    let (mut out, mut grads) = outputs(&shape);
    inputs.forward(&shape, &mut out, ws);
    inputs.backward(&shape, &mut grads, ws);
    let naive = inputs.naive_backward(case);
    assert_same(&inputs.naive_forward(case), &out, case.name);
    assert_same(&naive.dx, &grads.dx, case.name);
    assert_same(&naive.dw, &grads.dw, case.name);
    assert_same(&naive.db, &grads.db, case.name);
}

fn bench<T: Element>(criterion: &mut Criterion, case: &ConvCase, with_naive: bool) {
    let (shape, ws) = (&case.shape, &mut Workspace::new());
    check::<T>(case, if with_naive { shape.images() } else { 2 }, ws);
    let inputs = Inputs::<T>::new(shape);
    let (mut out, mut grads) = outputs(shape);
    let flops = shape.flops();

    let mut forward = group(criterion, &format!("conv {} {} forward", case.name, T::NAME), flops);
    if flops > 5_000_000_000 {
        slow(&mut forward);
    }
    forward.bench_function("fast", |b| b.iter(|| inputs.forward(shape, &mut out, ws)));
    if with_naive {
        slow(&mut forward);
        forward.bench_function("naive", |b| b.iter_with_large_drop(|| inputs.naive_forward(case)));
    }
    forward.finish();

    let mut backward = group(criterion, &format!("conv {} {} backward", case.name, T::NAME), 2 * flops);
    if flops > 2_000_000_000 {
        slow(&mut backward);
    }
    backward.bench_function("fast", |b| b.iter(|| inputs.backward(shape, &mut grads, ws)));
    if with_naive {
        slow(&mut backward);
        backward.bench_function("naive", |b| b.iter_with_large_drop(|| inputs.naive_backward(case)));
    }
    backward.finish();
}

pub(crate) fn run(criterion: &mut Criterion) {
    bench::<f64>(criterion, &seed_conv(), true);
    bench::<f32>(criterion, &seed_conv(), true);
    for case in network_convs() {
        bench::<f32>(criterion, &case, false);
    }
}
