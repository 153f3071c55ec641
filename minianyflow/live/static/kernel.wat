;; One layer of the MLP for the page, out = act(h W + b) + h, and its slope. Float32, four outputs of four rows at a time.
;; compute.js holds the bytes that `npx wat2wasm kernel.wat` makes of this, in base64.
(module
  (memory (export "memory") 64)
  ;; gelu(x) = x gate(x), gate(x) = 1 / (1 + exp(-y)), y = 1.5958 (x + .044715 x^3): exp by 2^k times a polynomial, right to 1e-7
  (func $gate (param $x v128) (result v128) (local $y v128) (local $k v128)
    (local.set $y (f32x4.mul (f32x4.mul (local.get $x) (v128.const f32x4 -2.302208198 -2.302208198 -2.302208198 -2.302208198)) ;; -1.5958 log2(e)
      (f32x4.add (v128.const f32x4 1 1 1 1) (f32x4.mul (v128.const f32x4 0.044715 0.044715 0.044715 0.044715) (f32x4.mul (local.get $x) (local.get $x))))))
    (local.set $y (f32x4.max (v128.const f32x4 -126 -126 -126 -126) (f32x4.min (v128.const f32x4 126 126 126 126) (local.get $y))))
    (local.set $k (f32x4.nearest (local.get $y)))
    (local.set $y (f32x4.sub (local.get $y) (local.get $k)))
    (f32x4.div (v128.const f32x4 1 1 1 1) (f32x4.add (v128.const f32x4 1 1 1 1) (f32x4.mul
      (i32x4.shl (i32x4.add (i32x4.trunc_sat_f32x4_s (local.get $k)) (v128.const i32x4 127 127 127 127)) (i32.const 23))
      (f32x4.add (v128.const f32x4 1 1 1 1) (f32x4.mul (local.get $y) (f32x4.add (v128.const f32x4 0.69314718 0.69314718 0.69314718 0.69314718)
      (f32x4.mul (local.get $y) (f32x4.add (v128.const f32x4 0.24022651 0.24022651 0.24022651 0.24022651)
      (f32x4.mul (local.get $y) (f32x4.add (v128.const f32x4 0.05550411 0.05550411 0.05550411 0.05550411)
      (f32x4.mul (local.get $y) (f32x4.add (v128.const f32x4 0.00961813 0.00961813 0.00961813 0.00961813)
      (f32x4.mul (local.get $y) (f32x4.add (v128.const f32x4 0.00133336 0.00133336 0.00133336 0.00133336)
      (f32x4.mul (local.get $y) (v128.const f32x4 0.00015469 0.00015469 0.00015469 0.00015469)))))))))))))))))
  ;; addresses of h (n in), W (in out), b (out), out (n out), all float32; n and fanOut multiples of four
  (func (export "layer") (param $h i32) (param $n i32) (param $W i32) (param $b i32) (param $in i32) (param $out i32) (param $to i32) (param $inner i32)
    (local $row i32) (local $o i32) (local $p i32) (local $w i32) (local $i i32) (local $at i32) (local $wide i32) (local $step i32) (local $v v128)
    (local $a v128) (local $c v128) (local $d v128) (local $e v128)
    (local.set $step (i32.shl (local.get $in) (i32.const 2)))
    (local.set $wide (i32.shl (local.get $out) (i32.const 2)))
    (loop $rows
      (local.set $o (i32.const 0))
      (loop $outs
        (local.set $a (v128.load (i32.add (local.get $b) (local.get $o))))
        (local.set $c (local.get $a)) (local.set $d (local.get $a)) (local.set $e (local.get $a))
        (local.set $p (i32.add (local.get $h) (i32.mul (local.get $row) (local.get $step))))
        (local.set $w (i32.add (local.get $W) (local.get $o)))
        (local.set $i (local.get $in))
        (loop $sum
          (local.set $v (v128.load (local.get $w)))
          (local.set $a (f32x4.add (local.get $a) (f32x4.mul (local.get $v) (v128.load32_splat (local.get $p)))))
          (local.set $c (f32x4.add (local.get $c) (f32x4.mul (local.get $v) (v128.load32_splat (i32.add (local.get $p) (local.get $step))))))
          (local.set $d (f32x4.add (local.get $d) (f32x4.mul (local.get $v) (v128.load32_splat (i32.add (local.get $p) (i32.shl (local.get $step) (i32.const 1)))))))
          (local.set $e (f32x4.add (local.get $e) (f32x4.mul (local.get $v) (v128.load32_splat (i32.add (local.get $p) (i32.mul (local.get $step) (i32.const 3)))))))
          (local.set $p (i32.add (local.get $p) (i32.const 4)))
          (local.set $w (i32.add (local.get $w) (local.get $wide)))
          (br_if $sum (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))
        (local.set $p (i32.add (i32.add (local.get $h) (i32.mul (local.get $row) (local.get $step))) (local.get $o)))
        (local.set $at (i32.add (i32.add (local.get $to) (i32.mul (local.get $row) (local.get $wide))) (local.get $o)))
        (if (local.get $inner) (then
          (local.set $a (f32x4.mul (local.get $a) (call $gate (local.get $a)))) (local.set $c (f32x4.mul (local.get $c) (call $gate (local.get $c))))
          (local.set $d (f32x4.mul (local.get $d) (call $gate (local.get $d)))) (local.set $e (f32x4.mul (local.get $e) (call $gate (local.get $e))))
          (if (i32.eq (local.get $in) (local.get $out)) (then
            (local.set $a (f32x4.add (local.get $a) (v128.load (local.get $p))))
            (local.set $c (f32x4.add (local.get $c) (v128.load (i32.add (local.get $p) (local.get $step)))))
            (local.set $d (f32x4.add (local.get $d) (v128.load (i32.add (local.get $p) (i32.shl (local.get $step) (i32.const 1))))))
            (local.set $e (f32x4.add (local.get $e) (v128.load (i32.add (local.get $p) (i32.mul (local.get $step) (i32.const 3))))))))))
        (v128.store (local.get $at) (local.get $a))
        (v128.store (i32.add (local.get $at) (local.get $wide)) (local.get $c))
        (v128.store (i32.add (local.get $at) (i32.shl (local.get $wide) (i32.const 1))) (local.get $d))
        (v128.store (i32.add (local.get $at) (i32.mul (local.get $wide) (i32.const 3))) (local.get $e))
        (br_if $outs (i32.lt_u (local.tee $o (i32.add (local.get $o) (i32.const 16))) (local.get $wide))))
      (br_if $rows (i32.lt_u (local.tee $row (i32.add (local.get $row) (i32.const 4))) (local.get $n)))))
  ;; addresses of a, h, out = gelu(a) + h, slope = d gelu / d a, all float32; count: numbers of each, a multiple of four
  (func (export "bend") (param $a i32) (param $h i32) (param $to i32) (param $slope i32) (param $count i32)
    (local $x v128) (local $g v128) (local $bent v128) (local $at i32)
    (loop $all
      (local.set $x (v128.load (i32.add (local.get $a) (local.get $at))))
      (local.set $g (call $gate (local.get $x)))
      (local.set $bent (f32x4.mul (local.get $x) (local.get $g)))
      (v128.store (i32.add (local.get $to) (local.get $at)) (f32x4.add (local.get $bent) (v128.load (i32.add (local.get $h) (local.get $at)))))
      (v128.store (i32.add (local.get $slope) (local.get $at)) (f32x4.add (local.get $g) (f32x4.mul
        (f32x4.mul (local.get $bent) (f32x4.sub (v128.const f32x4 1 1 1 1) (local.get $g)))
        (f32x4.add (v128.const f32x4 1.59576912 1.59576912 1.59576912 1.59576912) (f32x4.mul (v128.const f32x4 0.21406443 0.21406443 0.21406443 0.21406443)
          (f32x4.mul (local.get $x) (local.get $x)))))))
      (local.set $at (i32.add (local.get $at) (i32.const 16)))
      (br_if $all (i32.gt_s (local.tee $count (i32.sub (local.get $count) (i32.const 4))) (i32.const 0)))))
)
