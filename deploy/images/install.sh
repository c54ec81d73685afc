# Installs our wheels and what a part needs: sh install.sh ENVIRONMENT [EXTRAS], with /wheels and /constraints.txt there.
set -eu
python="$1/bin/python"
wheels="${WHEELS:-/wheels}"
set -- "$1" "${2:-}" "$wheels"/collage_diffusion-*.whl
"$python" -m pip install --no-cache-dir --only-binary :all: -c "${CONSTRAINTS:-/constraints.txt}" \
  "$wheels"/collage_client-*.whl "$3${2:+[$2]}"
ln -s "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/collage_diffusion" "$1/rooms"
# Nobody installs anything later.
"$python" -m pip uninstall -q -y setuptools pip
