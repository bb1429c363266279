-- Runs once, on an empty volume. Two databases, because Optuna and MLflow both own a table `alembic_version`, and each
-- has an owner of its own that cannot enter the other. The passwords come from the environment of the container.
\set ON_ERROR_STOP on
\getenv studies_password STUDIES_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD

CREATE ROLE studies LOGIN PASSWORD :'studies_password';
CREATE DATABASE studies OWNER studies ENCODING 'UTF8' TEMPLATE template0;
REVOKE CONNECT, TEMPORARY ON DATABASE studies FROM PUBLIC;

CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE mlflow OWNER mlflow ENCODING 'UTF8' TEMPLATE template0;
REVOKE CONNECT, TEMPORARY ON DATABASE mlflow FROM PUBLIC;
