//! The gated sum.

use crate::kit::{assert_close, backend, rounded, typed, values, with_threads};
use half::{bf16, f16};
use nsa_core::Element as _;
use nsa_core::ShapeError;
use nsa_kernels::op::gate::{Backward, Forward, backward, forward};
use nsa_kernels::{Element, Error, Tensor, TensorMut};
use nsa_ref::Exact;

struct Case<T> {
    shape: [usize; 3],
    gates: Vec<T>,
    branches: [Vec<T>; 3],
    d_o: Vec<T>,
}

impl<T: Element> Case<T> {
    fn new(shape: [usize; 3]) -> Self {
        let [n, heads, _] = shape;
        let branches = ["cmp", "slc", "win"].map(|name| typed(&values::<T>(name, &shape)));
        let gates = typed(&values::<T>("gates", &[n, heads, 3]));
        Self { shape, gates, branches, d_o: typed(&values::<T>("d_o", &shape)) }
    }

    fn run(&self) -> (Vec<T>, Vec<T::Acc>) {
        let ([n, heads, _], backend) = (self.shape, backend());
        let branches = || self.branches.each_ref().map(|b| Tensor::host(b, self.shape).unwrap());
        let mut o = vec![T::from_f64(f64::NAN); self.d_o.len()];
        let mut d_gates = vec![T::Acc::from_f64(f64::NAN); self.gates.len()];
        let gates = Tensor::host(&self.gates, [n, heads, 3]).unwrap();
        let args = Forward { gates, branches: branches(), o: TensorMut::host(&mut o, self.shape).unwrap() };
        forward(&backend, args).unwrap();
        let args = Backward {
            branches: branches(),
            d_o: Tensor::host(&self.d_o, self.shape).unwrap(),
            d_gates: TensorMut::host(&mut d_gates, [n, heads, 3]).unwrap(),
        };
        backward(&backend, args).unwrap();
        (o, d_gates)
    }

    fn check(&self) {
        let [n, heads, _] = self.shape;
        let wide = |shape: &[usize], data: &[T]| nsa_ref::Tensor::from_elements(shape, data);
        let gates = wide(&[n, heads, 3], &self.gates);
        let branches = self.branches.each_ref().map(|b| wide(&self.shape, b));
        let (branches, d_o) = (branches.each_ref(), wide(&self.shape, &self.d_o));
        let rounded = rounded::<T>();
        let (o, d_gates) = with_threads(2, || self.run());
        let truth = nsa_ref::gate::forward(&Exact, &gates, branches).unwrap();
        assert_close("o", &o, &truth, &nsa_ref::gate::forward(&rounded, &gates, branches).unwrap());
        let truth = nsa_ref::gate::backward(&Exact, &gates, branches, &d_o).unwrap().0;
        let rounded = nsa_ref::gate::backward(&rounded, &gates, branches, &d_o).unwrap().0;
        assert_close("d_gates", &d_gates, &truth, &rounded);
        assert!((o, d_gates) == with_threads(1, || self.run()), "bits depend on the threads");
    }
}

#[test]
fn every_type_on_odd_shapes() {
    for shape in [[0, 2, 4], [1, 1, 1], [7, 3, 13], [301, 5, 40]] {
        Case::<f32>::new(shape).check();
        Case::<f64>::new(shape).check();
        Case::<bf16>::new(shape).check();
        Case::<f16>::new(shape).check();
    }
}

#[test]
fn a_wrong_shape_is_named() {
    let (backend, data) = (backend(), [0.0f32; 24]);
    let tensor = |shape| Tensor::host(&data, shape).unwrap();
    let mut out = [0.0f32; 24];
    let o = TensorMut::host(&mut out, [2, 3, 4]).unwrap();
    let branches = [tensor([2, 3, 4]), tensor([2, 4, 3]), tensor([2, 3, 4])];
    let error = forward(&backend, Forward { gates: tensor([2, 3, 3]), branches, o }).unwrap_err();
    let expected = ShapeError::check("gate::forward", "branches[1]", &[2, 3, 4], &[2, 4, 3]).unwrap_err();
    assert_eq!(error, Error::Shape(expected));
}
