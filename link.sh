set -e
D=/work/main/build/cp311-cp311-linux_x86_64
objs=$(for f in $D/CMakeFiles/_cpu.dir/src/rbe/kernels/csrc/*.o; do b=$(basename $f); [ -e /work/lab/objsp/$b ] || echo $f; done)
g++ -fPIC -O3 -shared -Wl,--gc-sections -o /work/lab/sp/src/rbe/_cpu.new.so $objs /work/lab/objsp/*.o $D/libnanobind-static.a -lgomp -lpthread
mv /work/lab/sp/src/rbe/_cpu.new.so /work/lab/sp/src/rbe/_cpu.cpython-311-x86_64-linux-gnu.so
