# Sourced by the other scripts, in the repository: an environment that meets requirements.txt. The active virtual
# environment is used where there is one, else .venv is made.
if [[ -z ${VIRTUAL_ENV-} && ${CONDA_DEFAULT_ENV-base} == base ]]; then
    if [[ ! -x .venv/bin/pip ]]; then
        ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: Python 3.10 or newer is needed; PYTHON names another interpreter" >&2; exit 2; }
        echo "making a virtual environment in .venv"
        ${PYTHON:-python3} -m venv .venv || exit
    fi
    source .venv/bin/activate
fi
echo "installing what requirements.txt asks for into $(python -c 'import sys; print(sys.prefix)')"
python -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit
