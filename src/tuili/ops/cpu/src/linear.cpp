#include "linear.h"

namespace {

template <class Kind, int M, int N>
void tiles_of(const LinearArgs& a, Rows x, int64_t row, int64_t tile, int64_t steps) {
    using T = typename Kind::Storage;
    F sum[M][N];
    EACH(m, M)
        EACH(n, N) sum[m][n] = zero();
    int64_t bytes = steps * STEP;
    block<Kind>(sum, x.at, x.stride, (const char*)a.tiles + tile * bytes, bytes, steps);
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

template <class Kind, int M> void columns(const LinearArgs& a, Rows x, int64_t row, int64_t tile, int64_t tiles) {
    int64_t steps = Kind::steps(a.inputs), n = 0;
    for (; n + COLUMNS <= tiles; n += COLUMNS) tiles_of<Kind, M, COLUMNS>(a, x, row, tile + n, steps);
    for (; n < tiles; n++) tiles_of<Kind, M, 1>(a, x, row, tile + n, steps);
}

template <class Kind> void some_rows(const LinearArgs& a, Rows x, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    switch (rows) {
        case 1: return columns<Kind, 1>(a, x, row, tile, tiles);
        case 2: return columns<Kind, 2>(a, x, row, tile, tiles);
        case 3: return columns<Kind, 3>(a, x, row, tile, tiles);
        case 4: return columns<Kind, 4>(a, x, row, tile, tiles);
        case 5: return columns<Kind, 5>(a, x, row, tile, tiles);
        case 6: return columns<Kind, 6>(a, x, row, tile, tiles);
    }
}

template <class Kind> void linear(const LinearArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; b++) {  // blocks of nearly equal height: 8 rows are 4 + 4, not 6 + 2
        int64_t from = row + rows * b / blocks, to = row + rows * (b + 1) / blocks;
        const void* at = (const typename Kind::Storage*)a.x + from * a.x_stride;
        int64_t wide = Kind::steps(a.inputs) * Kind::INPUTS;
        some_rows<Kind>(a, prepare<Kind>(at, a.x_stride, a.inputs, wide, to - from), from, to - from, tile, tiles);
    }
}

}  // namespace

#define LINEAR_(isa) linear_##isa
#define LINEAR(isa) LINEAR_(isa)
void LINEAR(TUILI_ISA)(const LinearArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    if (a.dtype == 0)
        linear<Float>(a, row, rows, tile, tiles);
    else
        linear<Half>(a, row, rows, tile, tiles);
}
